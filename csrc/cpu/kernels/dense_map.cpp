#include "dense_map.h"

#include "dtypes.h"
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

namespace {

// A square of vectors turned over its diagonal.
template <typename Acc, int kWidth = kLanes<Acc>>
FPI_HOST_DEVICE void transpose(Vector<Acc>* v) {
  if constexpr (kWidth > 1) {
    constexpr int kHalf = kWidth / 2;
    for (int first = 0; first < kLanes<Acc>; first += kWidth) {
      for (int i = first; i < first + kHalf; ++i) {
        const Vector<Acc> a = v[i], b = v[i + kHalf];
        v[i] = halves<Acc, kWidth, false>(a, b);
        v[i + kHalf] = halves<Acc, kWidth, true>(a, b);
      }
    }
    transpose<Acc, kHalf>(v);
  }
}

// A square of weights as vectors of outputs, one for each input from i on.
template <typename T>
FPI_HOST_DEVICE void load_square(const DenseLayer<T>& layer, int64_t o, int64_t i,
                                 Vector<accumulate_t<T>>* square) {
  using Acc = accumulate_t<T>;
  constexpr int kSide = kLanes<Acc>;
  const T* from = layer.weight + o * layer.out_stride + i * layer.in_stride;
  const bool whole = o + kSide <= layer.out && i + kSide <= layer.in;
  if (whole && layer.out_stride == 1) {
    for (int j = 0; j < kSide; ++j) {
      square[j] = load(from + j * layer.in_stride);
    }
  } else if (whole && layer.in_stride == 1) {
    for (int j = 0; j < kSide; ++j) {
      square[j] = load(from + j * layer.out_stride);
    }
    transpose<Acc>(square);
  } else {
    for (int j = 0; j < kSide; ++j) {
      for (int l = 0; l < kSide; ++l) {
        const bool there = o + l < layer.out && i + j < layer.in;
        square[j][l] =
            there ? static_cast<Acc>(from[l * layer.out_stride + j * layer.in_stride]) : Acc(0);
      }
    }
  }
}

}  // namespace

template <typename T>
void dense_pack(const DenseLayer<T>& layer, accumulate_t<T>* packed, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  constexpr int kSide = kLanes<Acc>;
  constexpr int64_t kTogether = 4;  // panels: what follows in memory is read while it is at hand
  for (int64_t first = begin; first < end; first += kTogether) {
    const int64_t last = first + kTogether < end ? first + kTogether : end;
    for (int64_t i = 0; i < layer.in; i += kSide) {
      const int64_t inputs = layer.in - i < kSide ? layer.in - i : kSide;
      for (int64_t o = first * kPanel<Acc>; o < last * kPanel<Acc>; o += kSide) {
        Vector<Acc> square[kSide] = {};
        load_square(layer, o, i, square);
        const int64_t panel = o / kPanel<Acc>;
        Acc* to = packed + (panel * layer.in + i) * kPanel<Acc> + o % kPanel<Acc>;
        for (int64_t j = 0; j < inputs; ++j) {
          store<Acc>(to + j * kPanel<Acc>, square[j]);
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
FPI_FOR_DTYPES(FPI_INSTANTIATE)
#undef FPI_INSTANTIATE

}  // namespace fpi::FPI_CPU_NAMESPACE
