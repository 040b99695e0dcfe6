// Sizes of an operator's outputs, as arithmetic on the sizes of its inputs.
//
// A shape function runs once for given numbers of dimensions and writes down what it does to each size, so that the
// caller can repeat it on sizes that are not known yet (a batch of any size).
#pragma once

#include <initializer_list>
#include <vector>

#include "tensor.h"

namespace dr1 __attribute__((visibility("hidden"))) {

// One size: text in postfix form. "i0.1" is dimension 1 of input 0.
class Dim {
 public:
  Dim(int64_t value) : text_(std::to_string(value)) {}
  Dim(int value) : Dim(static_cast<int64_t>(value)) {}
  explicit Dim(std::string text) : text_(std::move(text)) {}
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

#define DR1_DIM(name, symbol)                                    \
  inline Dim name(const Dim& a, const Dim& b) {                  \
    return Dim(a.text() + " " + b.text() + " " + symbol);        \
  }
DR1_DIM(operator+, "+")
DR1_DIM(operator-, "-")
DR1_DIM(operator*, "*")
DR1_DIM(operator/, "/")
DR1_DIM(operator%, "%")
DR1_DIM(max, "max")
DR1_DIM(min, "min")
#undef DR1_DIM

class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<Dim> dims) : dims_(dims) {}
  explicit Shape(std::vector<Dim> dims) : dims_(std::move(dims)) {}
  int ndim() const { return static_cast<int>(dims_.size()); }
  Dim& operator[](int dim) { return dims_[at(dim)]; }
  const Dim& operator[](int dim) const { return dims_[at(dim)]; }
  void push_back(const Dim& dim) { dims_.push_back(dim); }
  std::string text() const {
    std::string text;
    for (const Dim& d : dims_) text += (text.empty() ? "" : ",") + d.text();
    return text;
  }

 private:
  size_t at(int dim) const {
    if (dim < 0) dim += ndim();
    check(dim >= 0 && dim < ndim(), "a shape of " + std::to_string(ndim()) + " dimensions has no such dimension");
    return static_cast<size_t>(dim);
  }
  std::vector<Dim> dims_;
};
using Shapes = std::vector<Shape>;

}  // namespace dr1
