#include "dense_map.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "layer.h"

namespace fpi::FPI_CPU_NAMESPACE {

template <typename T>
int64_t dense_panels(const DenseLayer<T>& layer) {
  return panels_of<accumulate_t<T>>(layer.out);
}

template <typename T>
int64_t dense_panel_values(const DenseLayer<T>& layer) {
  return kPanel<accumulate_t<T>> * layer.in;
}

template <typename T>
void dense_pack(const DenseLayer<T>& layer, accumulate_t<T>* packed, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kTogether = 16;  // inputs: a cache line of a weight's row, read once
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanel<Acc>;
    const int64_t outputs = layer.out - first < kPanel<Acc> ? layer.out - first : kPanel<Acc>;
    Acc* to = packed + first * layer.in;
    for (int64_t i = 0; i < layer.in; i += kTogether) {
      const int64_t inputs = layer.in - i < kTogether ? layer.in - i : kTogether;
      for (int64_t o = 0; o < kPanel<Acc>; ++o) {
        const T* from = layer.weight + (first + o) * layer.out_stride + i * layer.in_stride;
        for (int64_t j = 0; j < inputs; ++j) {
          to[(i + j) * kPanel<Acc> + o] =
              o < outputs ? static_cast<Acc>(from[j * layer.in_stride]) : Acc(0);
        }
      }
    }
  }
}

template <typename T>
void dense_map(const DenseLayer<T>& layer, const accumulate_t<T>* packed, const T* x, T* out,
               accumulate_t<T>* buffer, int64_t begin, int64_t end) {
  const accumulate_t<T>* in[kMapRows];
  T* to[kMapRows];
  int64_t sample[kMapRows];
  for (int64_t row = begin; row < end; row += kMapRows) {
    const int count = end - row < kMapRows ? static_cast<int>(end - row) : kMapRows;
    for (int r = 0; r < count; ++r) {
      sample[r] = row + r;
      in[r] = operand<T>(x + sample[r] * layer.in, nullptr, layer.in, buffer + r * layer.in);
      to[r] = out + sample[r] * layer.out;
    }
    apply<T, T>(layer, packed, 0.0, {count, in, nullptr, to, sample});
  }
}

#define FPI_INSTANTIATE(T)                                                            \
  template int64_t dense_panels(const DenseLayer<T>&);                                \
  template int64_t dense_panel_values(const DenseLayer<T>&);                          \
  template void dense_pack(const DenseLayer<T>&, accumulate_t<T>*, int64_t, int64_t); \
  template void dense_map(const DenseLayer<T>&, const accumulate_t<T>*, const T*, T*, \
                          accumulate_t<T>*, int64_t, int64_t);
FPI_INSTANTIATE(torch::headeronly::Half)
FPI_INSTANTIATE(torch::headeronly::BFloat16)
FPI_INSTANTIATE(float)
FPI_INSTANTIATE(double)
#undef FPI_INSTANTIATE

}  // namespace fpi::FPI_CPU_NAMESPACE
