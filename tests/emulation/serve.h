// Requests from the tests: a line with the operator's name and its numbers, then arrays, which it
// changes and which go back. machine.py speaks to main() in serve.cpp.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../../csrc/math/anderson.h"
#include "emulation.h"

namespace fpi::emulation {

struct Array {
  std::string name;
  size_t bytes;
  size_t offset;  // of the first byte in its memory, which is aligned to 16 and ends with the array
  std::unique_ptr<unsigned char[]> memory;
  std::unique_ptr<Tracked> tracked;
};

class Request {
 public:
  double number(const std::string& name) const { return numbers.at(name); }
  int64_t integer(const std::string& name) const { return static_cast<int64_t>(number(name)); }

  // Null if the test gave none.
  template <typename T>
  T* array(const std::string& name) const {
    for (const Array& a : arrays) {
      if (a.name == name) {
        return reinterpret_cast<T*>(a.memory.get() + a.offset);
      }
    }
    return nullptr;
  }

  std::unordered_map<std::string, double> numbers;
  std::vector<Array> arrays;
};

template <typename Acc>
Record<Acc> record_of(const Request& r) {
  return {.counters = r.array<int32_t>("counters"),
          .scalars = r.array<Acc>("scalars"),
          .bounds = r.array<Acc>("bounds"),
          .bound_columns = static_cast<int>(r.integer("bound_columns")),
          .index = r.array<int64_t>("index"),
          .limits = {.rtol = static_cast<Acc>(r.number("rtol")),
                     .offset = static_cast<Acc>(r.number("offset")),
                     .rounding = static_cast<Acc>(r.number("rounding")),
                     .patience = static_cast<int32_t>(r.integer("patience")),
                     .max_iterations = static_cast<int32_t>(r.integer("max_iterations"))}};
}

template <typename Acc>
Mixing<Acc> mixing_of(const Request& r) {
  return {static_cast<Acc>(r.number("ridge")), static_cast<Acc>(r.number("restart")),
          static_cast<int>(r.integer("every")), r.integer("starts_plain") != 0};
}

// At namespace scope: `Operator name("name", function);`
struct Operator {
  Operator(const std::string& name, void (*function)(const Request&));
};

}  // namespace fpi::emulation
