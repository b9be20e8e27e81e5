// Argument checks shared by the operators of both devices. Messages read
// `op: <argument> must <property> (got <value>)`.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "math/dense.h"
#include "math/progress.h"
#include "math/window.h"

// Unlike STD_TORCH_CHECK, the message starts with the operator, not with a source file.
#define FPI_CHECK(condition, ...)                                  \
  do {                                                             \
    if (__builtin_expect(!(condition), 0)) {                       \
      throw std::runtime_error(fpi::detail::message(__VA_ARGS__)); \
    }                                                              \
  } while (false)

namespace fpi {

using torch::stable::Tensor;

namespace detail {

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline std::string shape(const Tensor& x) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < x.dim(); ++d) {
    text << (d ? ", " : "") << x.size(d);
  }
  text << ']';
  return text.str();
}

inline std::string device(const Tensor& x) {
  return x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : "cpu";
}

// The stable ABI can't ask a tensor whether it requires grad or carries a tangent. While grad mode
// is on, an alias of it is a leaf of autograd's graph exactly if it does not require grad.
inline bool is_differentiated(const Tensor& x) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue alias[] = {from(x)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::alias", "", alias, TORCH_ABI_VERSION));
  StableIValue is_leaf[] = {alias[0]};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", is_leaf, TORCH_ABI_VERSION));
  StableIValue dual[] = {from(x), from(int64_t{0})};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_unpack_dual", "", dual, TORCH_ABI_VERSION));
  const Tensor primal = to<Tensor>(dual[0]);
  const Tensor tangent = to<Tensor>(dual[1]);
  return !to<bool>(is_leaf[0]) || tangent.defined();
}

}  // namespace detail

// Solvers call the operators with grad mode off, where this costs one flag.
inline void check_not_differentiated(const char* op, std::initializer_list<Tensor> arguments) {
  if (!aoti_torch_grad_mode_is_enabled()) {
    return;
  }
  for (const Tensor& x : arguments) {
    FPI_CHECK(!detail::is_differentiated(x), op,
              ": internal operator, not differentiable; call fpi_cuda.fixed_point");
  }
}

inline void check_contiguous(const char* op, const char* name, const Tensor& x) {
  FPI_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous (got shape ", detail::shape(x),
            " with other strides)");
}

// Raises where x, which is not empty, has no memory: where its storage was freed, it keeps its
// sizes (FSDP frees parameters so between their uses), and a view its offset. An eager step of a
// small batch feels each question, so the size of a storage, which costs the most, is asked for
// last.
inline void check_memory(const char* op, const char* name, const Tensor& x) {
  const int64_t offset = x.storage_offset();
  if (offset == 0 && x.const_data_ptr() != nullptr) {
    return;
  }
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  FPI_CHECK(offset > 0 && bytes > 0, op, ": ", name, " of shape ", detail::shape(x),
            " must have its values in memory (got one whose storage was freed, as "
            "untyped_storage().resize_(0) does); fill it again first");
}

inline void check_same_device(const char* op, const char* name, const Tensor& x,
                              const char* like_name, const Tensor& like) {
  FPI_CHECK(x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), op,
            ": ", name, " must be on the device of ", like_name, ", ", detail::device(like),
            " (got ", detail::device(x), ")");
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& x,
                             const char* like_name, const Tensor& like) {
  FPI_CHECK(x.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ",
            like_name, ", ", like.scalar_type(), " (got ", x.scalar_type(), ")");
}

inline void check_dtype(const char* op, const char* name, const Tensor& x,
                        torch::headeronly::ScalarType dtype) {
  FPI_CHECK(x.scalar_type() == dtype, op, ": ", name, " must be ", dtype, " (got ", x.scalar_type(),
            ")");
}

inline std::string joined(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (int64_t size : sizes) {
    text += (text.empty() ? "" : ", ") + std::to_string(size);
  }
  return text;
}

inline void check_sizes(const char* op, const char* name, const Tensor& x,
                        std::initializer_list<int64_t> sizes) {
  const auto got = x.sizes();
  bool same = got.size() == sizes.size();
  int64_t d = 0, count = 1;
  for (int64_t size : sizes) {
    same = same && got[d++] == size;
    count *= size;
  }
  FPI_CHECK(same, op, ": ", name, " must have shape [", joined(sizes), "] (got ", detail::shape(x),
            ")");
  check_contiguous(op, name, x);
  if (count > 0) {
    check_memory(op, name, x);
  }
}

inline torch::headeronly::ScalarType accumulate_dtype(const Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_step(const char* op, const Tensor& x, const Tensor& gx, const Tensor& out,
                       const Tensor& counters, const Tensor& scalars, const Tensor& tally,
                       const std::optional<Tensor>& index, const std::optional<Tensor>& bounds) {
  using torch::headeronly::ScalarType;
  check_not_differentiated(op, {x, gx});
  FPI_CHECK(x.dim() == 2, op, ": x must have shape [R, N] (got ", detail::shape(x), ")");
  const int64_t rows = x.size(0), n = x.size(1), samples = out.size(0);
  check_sizes(op, "x", x, {rows, n});
  check_sizes(op, "gx", gx, {rows, n});
  check_sizes(op, "out", out, {samples, n});
  check_sizes(op, "counters", counters, {samples, kCounters});
  check_sizes(op, "scalars", scalars, {samples, kScalars});
  check_sizes(op, "tally", tally, {kTallies});
  check_same_dtype(op, "gx", gx, "x", x);
  check_same_dtype(op, "out", out, "x", x);
  check_dtype(op, "counters", counters, ScalarType::Int);
  check_dtype(op, "tally", tally, ScalarType::Int);
  check_dtype(op, "scalars", scalars, accumulate_dtype(x));
  if (index) {
    check_sizes(op, "index", *index, {rows});
    check_dtype(op, "index", *index, ScalarType::Long);
  } else {
    FPI_CHECK(rows == samples, op, ": index must be given where x has ", rows, " rows for ",
              samples, " samples");
  }
  if (bounds) {
    if (bounds->dim() == 2) {
      check_sizes(op, "bounds", *bounds, {samples, kBounds});
    } else {
      check_sizes(op, "bounds", *bounds, {samples});
    }
    check_dtype(op, "bounds", *bounds, accumulate_dtype(x));
  }
  if (x.is_cuda()) {  // else none is: the CUDA kernels are taken where any tensor is there
    check_same_device(op, "gx", gx, "x", x);
    check_same_device(op, "out", out, "x", x);
    check_same_device(op, "counters", counters, "x", x);
    check_same_device(op, "scalars", scalars, "x", x);
    check_same_device(op, "tally", tally, "x", x);
    for (const auto* given : {&index, &bounds}) {
      if (*given) {
        check_same_device(op, given == &index ? "index" : "bounds", **given, "x", x);
      }
    }
  }
}

// Iterations are counted in int32.
inline void check_limits(const char* op, int64_t patience, int64_t max_iterations) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  FPI_CHECK(1 <= max_iterations && max_iterations <= kMost, op, ": max_iterations must be 1 to ",
            kMost, " (got ", max_iterations, ")");
  FPI_CHECK(0 <= patience && patience <= kMost, op, ": patience must be 0 to ", kMost, " (got ",
            patience, ")");
}

inline void check_trail(const char* op, const Tensor& x, const Tensor& out,
                        const std::optional<Tensor>& trail) {
  if (trail) {
    check_sizes(op, "trail", *trail, {out.size(0), kTrailLength, x.size(1)});
    check_same_dtype(op, "trail", *trail, "x", x);
    if (x.is_cuda()) {  // as in check_step
      check_same_device(op, "trail", *trail, "x", x);
    }
  }
}

inline void check_history(const char* op, int64_t m, int64_t max_history) {
  FPI_CHECK(m >= 1 && m <= max_history, op, ": history must be 1 to ", max_history, " (got ", m,
            ")");
}

inline void check_every(const char* op, int64_t every) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  FPI_CHECK(every >= 1 && every <= kMost, op, ": every must be 1 to ", kMost, " (got ", every, ")");
}

inline void check_window(const char* op, const Tensor& x, const Tensor& out, const Tensor& scalars,
                         const Tensor& values, const Tensor& residuals, const Tensor& gram,
                         int64_t max_history) {
  FPI_CHECK(values.dim() == 3, op, ": values must have shape [B, m, N] (got ",
            detail::shape(values), ")");
  const int64_t samples = out.size(0), m = values.size(1);
  check_history(op, m, max_history);
  check_sizes(op, "values", values, {samples, m, x.size(1)});
  check_sizes(op, "residuals", residuals, {samples, m, x.size(1)});
  check_sizes(op, "gram", gram, {samples, m, m});
  check_same_dtype(op, "values", values, "x", x);
  check_same_dtype(op, "residuals", residuals, "x", x);
  check_same_dtype(op, "gram", gram, "scalars", scalars);
  if (x.is_cuda()) {  // as in check_step
    check_same_device(op, "values", values, "x", x);
    check_same_device(op, "residuals", residuals, "x", x);
    check_same_device(op, "gram", gram, "x", x);
  }
}

// u of a dense layer: [B, size], or [size] for all samples.
inline void check_per_sample(const char* op, const char* name, const std::optional<Tensor>& u,
                             const Tensor& x, int64_t samples, int64_t size, bool shared) {
  if (!u) {
    return;
  }
  if (shared && u->dim() == 1) {
    check_sizes(op, name, *u, {size});
  } else {
    check_sizes(op, name, *u, {samples, size});
  }
  check_same_dtype(op, name, *u, "x", x);
  check_same_device(op, name, *u, "x", x);
}

inline void check_weight(const char* op, const char* name, const Tensor& weight, const Tensor& x,
                         int64_t in) {
  FPI_CHECK(weight.dim() == 2 && weight.size(1) == in, op, ": ", name, " must have shape [·, ", in,
            "] (got ", detail::shape(weight), ")");
  check_same_dtype(op, name, weight, "x", x);
  check_same_device(op, name, weight, "x", x);
  if (weight.numel() > 0) {
    check_memory(op, name, weight);
  }
}

inline void check_activation(const char* op, const char* name, int64_t activation) {
  FPI_CHECK(0 <= activation && activation < kActivations, op, ": ", name, " must be 0 to ",
            kActivations - 1, " (got ", activation, ")");
}

// A step of dense layers for a state like x's.
inline void check_dense(const char* op, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& u, int64_t activation,
                        const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& hidden_weight,
                        const std::optional<Tensor>& hidden_u, int64_t hidden_activation,
                        const std::optional<Tensor>& hidden_scale,
                        const std::optional<Tensor>& output_scale) {
  const int64_t samples = x.size(0), n = x.size(1);
  int64_t last = n;
  if (hidden_weight) {
    check_weight(op, "hidden_weight", *hidden_weight, x, n);
    last = hidden_weight->size(0);
  }
  check_weight(op, "weight", weight, x, last);
  FPI_CHECK(weight.size(0) == n, op, ": weight must have shape [", n, ", ", last, "] (got ",
            detail::shape(weight), ")");
  check_per_sample(op, "u", u, x, samples, n, true);
  check_per_sample(op, "scale", scale, x, samples, n, false);
  check_per_sample(op, "hidden_u", hidden_u, x, samples, last, true);
  check_per_sample(op, "hidden_scale", hidden_scale, x, samples, last, false);
  check_per_sample(op, "output_scale", output_scale, x, samples, n, false);
  check_activation(op, "activation", activation);
  check_activation(op, "hidden_activation", hidden_activation);
}

inline void check_dense_map(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& u,
                            const Tensor& out) {
  constexpr const char* op = "_dense_map";
  check_not_differentiated(op, {x, weight});
  FPI_CHECK(x.dim() == 2, op, ": x must have shape [B, K] (got ", detail::shape(x), ")");
  check_sizes(op, "x", x, {x.size(0), x.size(1)});
  check_weight(op, "weight", weight, x, x.size(1));
  check_per_sample(op, "u", u, x, x.size(0), weight.size(0), true);
  check_sizes(op, "out", out, {x.size(0), weight.size(0)});
  check_same_dtype(op, "out", out, "x", x);
}

}  // namespace fpi
