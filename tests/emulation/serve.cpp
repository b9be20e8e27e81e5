#include "serve.h"

#include <iostream>
#include <sstream>

namespace fpi::emulation {
namespace {

std::unordered_map<std::string, void (*)(const Request&)>& operators() {
  static std::unordered_map<std::string, void (*)(const Request&)> all;
  return all;
}

// order seed alive count deleted...
Options read_options(std::istream& in) {
  Options options;
  int order = 0;
  size_t count = 0;
  in >> order >> options.seed >> options.alive >> count;
  options.order = static_cast<Order>(order);
  options.deleted.resize(count);
  for (uintptr_t& call : options.deleted) {
    in >> call;
  }
  return options;
}

// count (name bytes offset)..., and the bytes after the line
std::vector<Array> read_arrays(std::istream& in) {
  size_t count = 0;
  in >> count;
  std::vector<Array> arrays(count);
  for (Array& a : arrays) {
    in >> a.name >> a.bytes >> a.offset;
  }
  for (Array& a : arrays) {
    a.memory.reset(new unsigned char[a.offset + a.bytes]);
    unsigned char* begin = a.memory.get() + a.offset;
    std::cin.read(reinterpret_cast<char*>(begin), static_cast<std::streamsize>(a.bytes));
    a.tracked = std::make_unique<Tracked>(begin, a.bytes, a.name, Tracked::kGiven);
  }
  return arrays;
}

void serve(const std::string& line) {
  std::istringstream in(line);
  Request request;
  std::string name, number;
  size_t count = 0;
  in >> name;
  configure(read_options(in));
  for (in >> count; count > 0; --count) {
    in >> number;
    in >> request.numbers[number];
  }
  request.arrays = read_arrays(in);
  if (!in || operators().count(name) == 0) {
    fail("can't serve: " + line);
  }
  operators()[name](request);

  std::cout << "done";
  for (const Reached& r : reached()) {
    std::cout << '\t' << r.kind << ' ' << r.caller;
  }
  std::cout << '\n';
  for (const Array& a : request.arrays) {
    std::cout.write(reinterpret_cast<const char*>(a.memory.get() + a.offset),
                    static_cast<std::streamsize>(a.bytes));
  }
  std::cout.flush();
}

}  // namespace

Operator::Operator(const std::string& name, void (*function)(const Request&)) {
  operators()[name] = function;
}

}  // namespace fpi::emulation

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);) {
    fpi::emulation::serve(line);
  }
}
