// When a norm may be taken as the root of a plain sum of squares.
#pragma once

#include "macros.h"

namespace fpi {

// Whether a sum of squares neither under- nor overflowed, nor lost much of it.
template <typename Acc>
FPI_HOST_DEVICE bool is_trusted(Acc squares) {
  const Acc tiny = sizeof(Acc) == 4 ? Acc(1e-30) : Acc(1e-290);
  const Acc huge = sizeof(Acc) == 4 ? Acc(1e30) : Acc(1e290);
  return squares > tiny && squares < huge;
}

}  // namespace fpi
