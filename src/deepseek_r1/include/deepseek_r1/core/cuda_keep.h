// Rows of which a part stands both below a reduction and beside it, as the exponential in a softmax: it is computed once
// and kept in registers.
#pragma once

#include "cuda_rows.h"

#if defined(__CUDACC__)

namespace dr1 __attribute__((visibility("hidden"))) {
namespace cuda {

// Fours of a row that one thread keeps, and threads at most.
constexpr int KEPT = 4, KEEPERS = 1024;

template <class C, class T, int L>
struct KeepingFold : BlockFold<C, T, L, true> {
  C kept[KEPT][4];
  using BlockFold<C, T, L, true>::fold;
  template <class F, class A, class K>
  __device__ C fold(A& a, int64_t width, K& core) {
    core.seek(this->place), a.seek(this->place);
    C mine = neutral<F, C>();
    // Beyond the end the first elements are computed again and left out: without a branch all reads go out at once.
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int own = threadIdx.x + i * blockDim.x, j = own < width / 4 ? own : 0;
      core.seek(Hold{j}), a.seek(Hold{j});
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        kept[i][k] = core.template eval<C>(Among{4 * j + k, k});
        const C x = join<F>(mine, a.template eval<C>(AmongKept<C>{{4 * j + k, k}, kept[i][k]}));
        mine = own == j ? x : mine;
      }
    }
    return fold_block<F>(mine);
  }
};

template <class C, class T, int L, class E>
__global__ void __launch_bounds__(KEEPERS) keeping_rows(const __grid_constant__ Plan<L> plan, E e) {
  const Place<C, T, L> place{plan, own_row()};
  if (place.row >= plan.rows) return;
  KeepingFold<C, T, L> fold{{place}, {}};
  e.prepare(fold);
  e.seek(place);
  auto* to = reinterpret_cast<Four<T>*>(static_cast<T*>(plan.data[0]) + plan.offset(place.row, 0));
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    const int own = threadIdx.x + i * blockDim.x, j = own < plan.width / 4 ? own : 0;
    e.seek(Hold{j});
    Four<T> four;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      storage::write<C>(four.x + k, e.template eval<C>(AmongKept<C>{{4 * j + k, k}, fold.kept[i][k]}));
    }
    if (own == j) to[j] = four;
  }
}

template <class A, class... Rest>
struct First {
  using type = A;
};
template <class... Rest>
struct First<Nothing, Rest...> : First<Rest...> {};
template <>
struct First<Nothing> {
  using type = Nothing;
};
template <class... A>
using FirstOf = typename First<A...>::type;

// Whether N is made of values alone, so that two of one type that read the same tensors are equal.
template <class N>
constexpr bool values_only = std::is_same_v<N, Tensor> || std::is_same_v<N, Scalar> || std::is_same_v<N, Nothing>;
template <class F, class A, class B, class D>
constexpr bool values_only<Apply<F, A, B, D>> = values_only<A> && values_only<B> && values_only<D>;
template <class F, class A>
constexpr bool values_only<Reduce<F, A>> = values_only<A>;
template <class A>
constexpr bool values_only<Width<A>> = true;

// The largest part of N that stands in E too.
template <class E, class N>
struct Shared {
  using type = Nothing;
};
template <class E, class F, class A, class B, class D>
struct Shared<E, Apply<F, A, B, D>> {
  using N = Apply<F, A, B, D>;
  static constexpr bool whole = HasPart<E, N>::value && values_only<N> && N::leaves > 0;
  using type = FirstOf<std::conditional_t<whole, N, Nothing>, typename Shared<E, A>::type, typename Shared<E, B>::type,
                       typename Shared<E, D>::type>;
};

// The part of E to keep: one that stands both below a reduction of N and in E; Nothing if there is none.
template <class E, class N = E>
struct Kept {
  using type = Nothing;
};
template <class E, class F, class A, class B, class D>
struct Kept<E, Apply<F, A, B, D>> {
  using type = FirstOf<typename Kept<E, A>::type, typename Kept<E, B>::type, typename Kept<E, D>::type>;
};
template <class E, class F, class A>
struct Kept<E, Reduce<F, A>> {
  using type = FirstOf<typename Shared<E, A>::type, typename Kept<E, A>::type>;
};

// Calls `f` with every part of type K, below reductions too.
template <class K, class N, class Fn>
void each(const N&, Fn&&) {}
template <class K, class F, class A, class Fn>
void each(const Reduce<F, A>& e, Fn&& f);
template <class K, class F, class A, class B, class D, class Fn>
void each(const Apply<F, A, B, D>& e, Fn&& f) {
  if constexpr (std::is_same_v<K, Apply<F, A, B, D>>) {
    f(e);
  } else {
    each<K>(e.a, f), each<K>(e.b, f), each<K>(e.d, f);
  }
}
template <class K, class F, class A, class Fn>
void each(const Reduce<F, A>& e, Fn&& f) {
  each<K>(e.a, f);
}

// Runs the expression with a part of it kept, if there is one and a row of it fits into the registers of a block.
template <class C, class T, int L, class E>
bool keep(const Plan<L>& plan, const E& e, Leaves<L>& leaves, dim3 blocks, cudaStream_t stream) {
  using K = typename Kept<E>::type;
  if constexpr (!std::is_same_v<K, Nothing>) {
    const K* kept = nullptr;
    bool equal = true;
    each<K>(e, [&](const K& k) {
      equal = equal && (!kept || kept->same(k));
      kept = &k;
    });
    const int64_t fours = plan.width / 4;
    if (!equal || plan.width % 4 != 0 || fours > KEPT * KEEPERS || width_of(*kept) != plan.width) return false;
    const auto threads = static_cast<unsigned>((fours + 32 * KEPT - 1) / (32 * KEPT) * 32);
    const Binder<C, Leaf<C, T>, L, K> binder{&leaves, plan.width, kept};
    keeping_rows<C, T, L><<<blocks, threads, 0, stream>>>(plan, e.bind(binder));
    succeed(cudaGetLastError());
    return true;
  }
  return false;
}

}  // namespace cuda
}  // namespace dr1

#endif
