// Every operator of fpi_cuda. Kernels are registered at the foot of csrc/cpu/*.cpp and
// csrc/cuda/*.cu, in files named after the operator. All operators are internals of the Python
// package: none is differentiable, and each refuses tensors that require grad.
#include <torch/csrc/stable/library.h>

// clang-format off: it joins and breaks the lines of tables
STABLE_TORCH_LIBRARY(fpi_cuda, m) {
  // One step of every active row of x, and the end of those that finish. R rows hold the samples
  // index[R] of B; Acc is float64 for float64 states, else float32.
  //   x, gx      [R, N]  iterates, moved in place; g at them
  //   out        [B, N]  results of finished samples
  //   counters   [B, 8]  int32, scalars [B, 9] Acc: csrc/math/progress.h
  //   tally      [3]     int32: set to the rows still active; grows by those that failed; grows
  //                      by 1, the iterations made, so that a device needs no host to count them
  //   index      [R]     int64; none: row r holds sample r
  //   bounds     [B]     Acc: the least norm that rtol multiplies; or [B, 6]: that one, and each
  //                      sample's own rtol, offset, patience, max_iterations and rounding; none: 0
  // offset is atol √N. Shapes, dtypes, devices, storages and the numbers are checked. On the CPU so
  // are values by which kernels index: `index` holds samples once each, and active samples have
  // iterations from 0, a window and a head within m, limits of their own within int32. On CUDA,
  // where to look would be to wait, these are trusted, but that no head or window leads out of
  // bounds: they are what Progress and the steps themselves write.
#define FPI_STEP                                                                       \
  "Tensor(a!) x, Tensor gx, Tensor(b!) out, Tensor(c!) counters, Tensor(d!) scalars, " \
  "Tensor(e!) tally, Tensor? index, Tensor? bounds, float rtol, float offset, "         \
  "float rounding, int patience, int max_iterations, float beta"
  //   trail      [B, 2, N]  the last iterates before x, where they are kept; none: nothing is
  //                         measured of g but its rate at beta = 1
  m.def("_picard_step(" FPI_STEP ", Tensor(f!)? trail) -> ()");
  //   values, residuals  [B, m, N]  rings of g(x) and g(x) − x;  gram [B, m, m] Acc
  //   every              iterations to a mixture; between two of them steps are plain ones
  //   starts_plain       no mixture before plain steps have shown themselves to be slow
  m.def("_anderson_step(" FPI_STEP
        ", float ridge, float restart, Tensor(f!) values, Tensor(g!) residuals, Tensor(h!) gram, "
        "int every=1, bool starts_plain=False) -> ()");
  //   base [B, 2, N], vectors [B, 4, N] Acc, numbers [B, 6] Acc: csrc/math/bicgstab.h; a window is
  //   what x is, 0 to 2; beta is not looked at
  m.def("_bicgstab_step(" FPI_STEP
        ", Tensor(f!) base, Tensor(g!) vectors, Tensor(h!) numbers) -> ()");
#undef FPI_STEP

  // A whole solve of a step of dense layers: every sample of x0 iterated to its own end. With
  // t = scale ∘ x, or t = x:
  //   one layer    g(x) = φ(residual t + t Wᵀ + u)
  //   two layers   g(x) = φ(residual t + h Wᵀ + u),  h = φ₁(t W₁ᵀ + u₁)
  // and d ∘ (…) + u in place of φ(… + u) in a layer that has a d.
  //   x0, out             [B, N]
  //   counters ... bounds as above; tally[2] grows by the most iterations that a sample took
  //   history             Anderson's; 1: Picard
  //   weight W            [N, K], K = N or H;  u, hidden_u: [B, ·], or [·] for all samples, or none
  //   activation          of csrc/math/activation.h
  //   hidden_weight W₁    [H, N];  hidden_scale d: [B, H], output_scale d: [B, N]
  //   tf32                products of tensor cores instead of float32's (CUDA)
  //   slots               rows that a thread or block iterates at a time; 0: as fits the machine
  // On the CPU the call ends with an error soon after a signal's handler raised (csrc/cpu/watch.h),
  // and what it wrote to means nothing. On CUDA the kernel runs to its end.
  m.def(
      "_dense_solve(Tensor x0, Tensor(a!) out, Tensor(b!) counters, Tensor(c!) scalars, "
      "Tensor(d!) tally, Tensor? bounds, float rtol, float offset, float rounding, int patience, "
      "int max_iterations, float beta, float ridge, float restart, int history, "
      "Tensor weight, Tensor? u, int activation, float residual, Tensor? scale, "
      "Tensor? hidden_weight, Tensor? hidden_u, int hidden_activation, Tensor? hidden_scale, "
      "Tensor? output_scale, bool tf32, int slots, int every=1, "
      "bool starts_plain=False) -> ()");
  // Whether a device solves rows like x0's whole, with H values in the hidden layer (−1: none).
  m.def("_dense_fits(Tensor x0, int hidden, int history) -> bool");
  // out = x Wᵀ + u by the same products in the same order:
  //   x [B, K], weight [N, K], u [N], out [B, N]
  m.def("_dense_map(Tensor x, Tensor weight, Tensor? u, Tensor(a!) out, bool tf32) -> ()");
}
// clang-format on
