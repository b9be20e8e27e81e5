// Whole solves of dense layers: the operators' own plans and bodies, on emulated blocks.
#pragma once

#include <algorithm>
#include <iterator>

#include "../../csrc/cuda/dense_layout.h"
#include "serve.h"

namespace fpi::cuda {

using emulation::Operator;
using emulation::Request;
using emulation::Tracked;

// A device as small as the test wants it.
class EmulatedDevice {
 public:
  explicit EmulatedDevice(const Request& r) : r_(r) {}

  int multiprocessors() const { return static_cast<int>(r_.integer("multiprocessors")); }
  int64_t shared_limit() const { return r_.integer("shared_limit"); }

  template <typename Body>
  int64_t blocks(int64_t) const {
    return multiprocessors();
  }

  unsigned char* memory(int64_t bytes, int64_t zeroed) const {
    bytes_.reset(new unsigned char[bytes]);
    zeroed_ = std::make_unique<Tracked>(bytes_.get(), zeroed, "counts", Tracked::kGiven);
    rest_ = std::make_unique<Tracked>(bytes_.get() + zeroed, bytes - zeroed, "work memory",
                                      Tracked::kFresh);
    std::memset(bytes_.get(), 0xff, bytes);
    std::memset(bytes_.get(), 0, zeroed);
    return bytes_.get();
  }

  template <typename Body>
  void start(const Body& body, int64_t blocks, size_t shared_bytes) const {
    emulation::allow_shared(shared_bytes);
    launch(body, blocks, shared_bytes);
  }

 private:
  const Request& r_;
  mutable std::unique_ptr<unsigned char[]> bytes_;
  mutable std::unique_ptr<Tracked> zeroed_, rest_;
};

// [samples, size], [size] for all samples, or none.
template <typename T>
PerSample<T> per_sample(const Request& r, const std::string& name, int64_t size) {
  return {r.array<T>(name), r.number("shares_" + name) != 0 ? 0 : size};
}

template <typename T>
void dense_solve(const Request& r) {
  const int64_t n = r.integer("n"), hidden = r.integer("hidden"), last = hidden < 0 ? n : hidden;
  const auto layer = [&](const std::string& prefix, int64_t in, int64_t out) {
    return DenseLayer<T>{
        .weight = r.array<T>(prefix + "weight"),
        .in = in,
        .out = out,
        .in_stride = 1,
        .out_stride = in,
        .u = per_sample<T>(r, prefix + "u", out),
        .scale = {r.array<T>(prefix.empty() ? "output_scale" : "hidden_scale"), out},
        .activation = static_cast<Activation>(r.integer(prefix + "activation"))};
  };
  const DenseStep<T> dense = {.n = n,
                              .scale = {r.array<T>("scale"), n},
                              .residual = r.number("residual"),
                              .has_hidden = hidden >= 0,
                              .hidden = hidden >= 0 ? layer("hidden_", n, hidden) : DenseLayer<T>{},
                              .output = layer("", last, n)};
  const DenseCall<T> call = {.samples = r.integer("samples"),
                             .x0 = r.array<T>("x0"),
                             .out = r.array<T>("out"),
                             .record = emulation::record_of<accumulate_t<T>>(r),
                             .tally = r.array<int32_t>("tally"),
                             .beta = r.number("beta"),
                             .mixing = emulation::mixing_of<accumulate_t<T>>(r),
                             .history = static_cast<int>(r.integer("history")),
                             .dense = dense,
                             .tf32 = r.number("tf32") != 0,
                             .slots = static_cast<int>(r.integer("slots"))};
  if (!dense_solve(call, EmulatedDevice(r))) {
    emulation::fail("the shape does not fit");
  }
}

// plan: slots, rows of W₁ and W in shared memory, whether the state is shared, bytes, rows at a
// time.
inline const Operator dense_plan_of("dense_plan", [](const Request& r) {
  const auto size = static_cast<int>(r.integer("value_bytes"));
  const auto history = static_cast<int>(r.integer("history"));
  const DenseShape shape = {.n = r.integer("n"),
                            .hidden = r.integer("hidden"),
                            .value_bytes = size,
                            .acc_bytes = size == 8 ? 8 : 4,
                            .history = history,
                            .sums = history > 1 ? anderson_sums(history) : kPicardSums,
                            .bounds = 1};
  const DensePlan p =
      dense_plan(shape, r.integer("samples"), static_cast<int>(r.integer("slots")),
                 static_cast<int>(r.integer("multiprocessors")), r.integer("shared_limit"),
                 history == 1 && (size == 2 || r.number("tf32") != 0));
  const int64_t values[] = {p.slots,     p.shared_hidden, p.shared_output,
                            p.is_shared, p.bytes,         p.rows.rows_per_block};
  std::copy(std::begin(values), std::end(values), r.array<int64_t>("plan"));
});

// tile: rows, columns and slab of a product.
inline const Operator product_tile_of("product_tile", [](const Request& r) {
  const int64_t rows = r.integer("rows");
  const ProductTile tile = tile_of(r.number("is_matrix") != 0, rows, r.integer("columns"));
  const int64_t values[] = {tile.rows, tile.columns, slab_of(tile, rows)};
  std::copy(std::begin(values), std::end(values), r.array<int64_t>("tile"));
});

template <typename T>
void dense_map(const Request& r) {
  const int64_t in = r.integer("k"), out = r.integer("n");
  const DenseLayer<T> layer = {.weight = r.array<T>("weight"),
                               .in = in,
                               .out = out,
                               .in_stride = 1,
                               .out_stride = in,
                               .u = per_sample<T>(r, "u", out),
                               .scale = {nullptr, 0},
                               .activation = kIdentity};
  if (!dense_map(static_cast<const T*>(r.array<T>("x")), r.array<T>("out"), r.integer("rows"),
                 layer, r.number("tf32") != 0, EmulatedDevice(r))) {
    emulation::fail("the shape does not fit");
  }
}

// `DenseOperators<T> name("dtype");` registers them.
template <typename T>
struct DenseOperators {
  explicit DenseOperators(const std::string& dtype)
      : solve("dense_solve." + dtype, dense_solve<T>), map("dense_map." + dtype, dense_map<T>) {}

  Operator solve, map;
};

}  // namespace fpi::cuda
