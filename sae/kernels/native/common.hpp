// What all kernels stand on: vectors as wide as the registers of the CPU that this is compiled for, and threads.
#pragma once

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

namespace {

using i32 = int32_t;
using i64 = int64_t;
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Quad __attribute__((vector_size(16)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // anywhere in memory
constexpr i64 HELD = 8;  // vectors that a loop holds in registers
constexpr i64 GRAIN = 1 << 14;  // floats that are worth a thread's asking for them

inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
inline Vec all(float x) { return Vec{} + x; }

inline float total(Vec v) {
  Quad parts[LANES / 4];
  std::memcpy(parts, &v, sizeof v);
#pragma GCC unroll 2
  for (int half = LANES / 8; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// Returns a bit for every lane that is above its cut or, if told so, equal to it; NaN is above all.
template <bool EQUAL>
inline uint64_t over(Vec v, Vec cut) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, (__m512)cut, EQUAL ? _CMP_NLT_UQ : _CMP_NLE_UQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)cut, EQUAL ? _CMP_NLT_UQ : _CMP_NLE_UQ));
#else
  uint64_t bits = 0;
  for (int i = 0; i < LANES; i++) bits |= uint64_t(EQUAL ? !(v[i] < cut[i]) : !(v[i] <= cut[i])) << i;
  return bits;
#endif
}

// The same of 64 numbers and, where `each`, 64 cuts, else one.
template <bool EQUAL>
inline uint64_t over_64(const float* s, const float* cuts, bool each) {
  uint64_t bits = 0;
#pragma GCC unroll 16
  for (int i = 0; i < 64; i += LANES) bits |= over<EQUAL>(load(s + i), each ? load(cuts + i) : all(*cuts)) << i;
  return bits;
}

using Body = void (*)(void*);

template <class Function>
Function found(const char* name) { return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name)); }

// Runs a body on some threads at once: those of PyTorch's own pool where its OpenMP can be found, as the threads of a
// second one would find them busy waiting.
void together(Body body, void* shared, int threads) {
  static const auto team = found<void (*)(Body, void*, unsigned, unsigned)>("GOMP_parallel");
  if (threads == 1) return body(shared);
  if (team) return team(body, shared, unsigned(threads), 0);
  struct Call { Body body; void* shared; } call{body, shared};
  auto run = [](void* p) -> void* { auto c = static_cast<Call*>(p); c->body(c->shared); return nullptr; };
  std::vector<pthread_t> others;
  pthread_t id;
  while (int(others.size()) < threads - 1 && !pthread_create(&id, nullptr, run, &call)) others.push_back(id);
  body(shared);
  for (auto id : others) pthread_join(id, nullptr);
}

// Calls work(first, last) for pieces of 0..items, each of `grain` or fewer. A thread begins with its own share, which lies
// where it lay in the call before, so that its core may hold it still; then it helps the others with theirs.
template <class Work>
void deal(int threads, i64 items, i64 grain, const Work& work) {
  struct alignas(64) Share { std::atomic<i64> next; i64 end; };
  struct Shared { const Work& work; i64 grain; int threads; Share* shares; std::atomic<int> come; };
  threads = int(std::max<i64>(1, std::min<i64>(threads, items / grain)));
  std::vector<Share> shares(threads);
  for (i64 i = 0; i < threads; i++) shares[i].next = items * i / threads, shares[i].end = items * (i + 1) / threads;
  Shared shared{work, grain, threads, shares.data(), {0}};
  auto body = [](void* p) {
    static const auto number = found<int (*)()>("omp_get_thread_num");
    auto& s = *static_cast<Shared*>(p);
    const int me = number ? number() : s.come++;
    for (int i = 0; i < s.threads; i++) {
      Share& share = s.shares[(me + i) % s.threads];
      for (i64 first; (first = share.next.fetch_add(s.grain)) < share.end;)
        s.work(first, std::min(first + s.grain, share.end));
    }
  };
  together(body, &shared, threads);
}

inline i64 rows_of(i64 size) { return std::max<i64>(1, GRAIN / std::max<i64>(1, size)); }

template <class Index>
bool inside(const Index* ids, i64 count, i64 m) {
  bool fine = true;
  for (i64 e = 0; e < count; e++) fine &= ids[e] >= 0 && ids[e] < m;
  return fine;
}

bool ordered(const i64* offsets, i64 n, i64 nnz) {
  bool fine = offsets[0] == 0 && offsets[n] == nnz;
  for (i64 t = 0; t < n; t++) fine &= offsets[t] <= offsets[t + 1];
  return fine;
}

}  // namespace
