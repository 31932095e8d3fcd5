// The kernels of `sae.kernels.native`, which says what each takes and returns: plain C behind pointers, so that it builds
// in seconds and against nothing but a compiler. Every function returns 0, or 1 where an index lies outside: nothing is
// read or written there then.
//
// The same bits for any number of threads: whoever is free takes the next rows, but what makes up a row is summed in a
// fixed order, and sums over rows are taken afterwards.
#include <climits>
#include <cmath>

#include "common.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// ---- the largest of a row -------------------------------------------------------------------------------------------

// An order of floats as integers: NaN above all, -0 equal to 0.
inline i32 key_of(float v) {
  i32 b;
  std::memcpy(&b, &v, 4);
  if (v != v) return INT_MAX;
  if (v == 0) return 0;
  return b ^ ((b >> 31) & INT_MAX);
}

inline float of_key(i32 key) {
  i32 b = key ^ ((key >> 31) & INT_MAX);
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}

// Returns a number that at least k of the keys reach, and more than k + slack only where those are equal.
i32 cut_of(const i32* keys, i64 n, i64 k, i64 slack) {
  i32 least = INT_MAX, most = INT_MIN;
  for (i64 i = 0; i < n; i++) least = std::min(least, keys[i]), most = std::max(most, keys[i]);
  i64 low = least, high = most;
  while (low < high) {
    const i32 middle = i32(low + (high - low + 1) / 2);
    i32 count = 0;
    for (i64 i = 0; i < n; i++) count += keys[i] >= middle;
    if (count < k) { high = i64(middle) - 1; continue; }
    low = middle;
    if (count <= k + slack) break;
  }
  return i32(low);
}

struct Candidates {
  std::vector<i32> keys, ids;
  i64 n = 0;

  // Keeps the k largest, in their order, and returns the cut; of equal ones the first.
  i32 shrink(i64 k) {
    const i32 cut = cut_of(keys.data(), n, k, 0);
    i64 left = k, kept = 0;
    for (i64 i = 0; i < n; i++) left -= keys[i] > cut;
    for (i64 i = 0; i < n && kept < k; i++)
      if (keys[i] > cut || (keys[i] == cut && left-- > 0)) keys[kept] = keys[i], ids[kept++] = ids[i];
    n = k;
    return cut;
  }
};

// Column c belongs to group c % groups; the largest members of k groups reach the cut that is returned, so k columns do.
float first_cut(const float* s, i64 m, i64 k, i64 groups, float* best, i32* keys) {
  for (i64 g = 0; g < groups; g += LANES) store(best + g, load(s + g));
  i64 c = groups;
  for (; c + groups <= m; c += groups)
    for (i64 g = 0; g < groups; g += LANES) {
      const Vec a = load(s + c + g), b = load(best + g);
      store(best + g, a > b ? a : b);
    }
  for (i64 g = 0; g < groups; g++) keys[g] = best[g] != best[g] ? INT_MIN : key_of(best[g]);
  const i32 cut = cut_of(keys, groups, k, k / 8);
  return cut == INT_MIN ? -INFINITY : of_key(cut);
}

void top_of_row(const float* s, i64 m, i64 k, i64 groups, float* best, Candidates& found, i64* out) {
  float cut = groups ? first_cut(s, m, k, groups, best, found.keys.data()) : -INFINITY;
  const i64 full = i64(found.keys.size()) - 64;
  found.n = 0;
  auto take = [&](i64 c) { found.keys[found.n] = key_of(s[c]), found.ids[found.n++] = i32(c); };
  i64 c = 0;
  for (; c + 64 <= m; c += 64) {
    for (uint64_t bits = over_64<true>(s + c, &cut, false); bits; bits &= bits - 1) take(c + __builtin_ctzll(bits));
    if (found.n > full) {
      const i32 key = found.shrink(k);
      if (key == INT_MAX) { c = m; break; }  // k are NaN already
      cut = std::nextafterf(of_key(key), INFINITY);  // later ones of the same value have lost
    }
  }
  for (; c < m; c++) if (!(s[c] < cut)) take(c);
  found.shrink(k);
  for (i64 j = 0; j < k; j++) out[j] = found.ids[j];
}

// ---- products of rows -----------------------------------------------------------------------------------------------

// out += sign * sum of a_r w_r, one after the other; `next` are rows to fetch meanwhile.
template <int R>
void add(float* __restrict__ out, i64 d, const float* const* w, const float* a, const float* const* next) {
  i64 c = 0;
  for (; c + LANES <= d; c += LANES) {
    Vec sum = load(out + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(next[r] + c);
      sum += a[r] * load(w[r] + c);
    }
    store(out + c, sum);
  }
  for (; c < d; c++)
    for (int r = 0; r < R; r++) out[c] += a[r] * w[r][c];
}

template <int R>
void dots(const float* x, i64 d, const float* const* w, float* out) {
  Vec sums[R] = {};
  float ends[R] = {};
  i64 c = 0;
  for (; c + LANES <= d; c += LANES) {
    const Vec v = load(x + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r] += v * load(w[r] + c);
  }
  for (; c < d; c++)
    for (int r = 0; r < R; r++) ends[r] += x[c] * w[r][c];
  for (int r = 0; r < R; r++) out[r] = total(sums[r]) + ends[r];
}

constexpr i64 ROWS = 8;  // of a weight that are read side by side

struct Codes {
  const i64 *offsets, *ids;
  const float* weight;
  i64 n, m, d, nnz;

  const float* row(i64 e) const { return weight + ids[std::min(e, nnz - 1)] * d; }
  bool fine() const { return ordered(offsets, n, nnz) && inside(ids, nnz, m); }

  void add_codes(i64 t, const float* values, float sign, float* out) const {
    const float *w[ROWS], *next[ROWS];
    float a[ROWS];
    i64 e = offsets[t];
    for (; e + ROWS <= offsets[t + 1]; e += ROWS) {
      for (i64 r = 0; r < ROWS; r++) w[r] = row(e + r), next[r] = row(e + ROWS + r), a[r] = sign * values[e + r];
      add<ROWS>(out, d, w, a, next);
    }
    for (; e < offsets[t + 1]; e++) {
      w[0] = row(e), next[0] = row(e + ROWS), a[0] = sign * values[e];
      add<1>(out, d, w, a, next);
    }
  }

  void multiply(i64 t, const float* x, float* out) const {
    const float* w[ROWS];
    i64 e = offsets[t];
    for (; e + ROWS <= offsets[t + 1]; e += ROWS) {
      for (i64 r = 0; r < ROWS; r++) w[r] = row(e + r);
      dots<ROWS>(x, d, w, out + e);
    }
    for (; e < offsets[t + 1]; e++) {
      w[0] = row(e);
      dots<1>(x, d, w, out + e);
    }
  }
};

// ---- gradients of weights -------------------------------------------------------------------------------------------

struct Gradient {
  const i64* starts;
  const i32 *order, *tokens;
  const float *coefficients, *rows;
  i64 d;
  float* out;

  // Sums HELD vectors of a row of `out` from column c on, or what is left of it.
  void columns(i64 j, i64 c, Vec& squares, float& ends) const {
    float* to = out + j * d;
    if (c + HELD * LANES <= d) {
      Vec sums[HELD] = {};
      for (i64 q = starts[j]; q < starts[j + 1]; q++) {
        const float a = coefficients[order[q]];
        const float* row = rows + tokens[q] * d + c;
#pragma GCC unroll 8
        for (int i = 0; i < HELD; i++) sums[i] += a * load(row + i * LANES);
      }
#pragma GCC unroll 8
      for (int i = 0; i < HELD; i++) store(to + c + i * LANES, sums[i]), squares += sums[i] * sums[i];
      return;
    }
    for (; c + LANES <= d; c += LANES) {
      Vec sum = {};
      for (i64 q = starts[j]; q < starts[j + 1]; q++) sum += coefficients[order[q]] * load(rows + tokens[q] * d + c);
      store(to + c, sum), squares += sum * sum;
    }
    for (; c < d; c++) {
      float sum = 0;
      for (i64 q = starts[j]; q < starts[j + 1]; q++) sum += coefficients[order[q]] * rows[tokens[q] * d + c];
      to[c] = sum, ends += sum * sum;
    }
  }

  float row(i64 j) const {
    Vec squares = {};
    float ends = 0;
    if (starts[j] == starts[j + 1]) return std::memset(out + j * d, 0, 4 * d), 0.f;
    for (i64 c = 0; c < d; c += HELD * LANES) columns(j, c, squares, ends);
    return total(squares) + ends;
  }
};

float squares_of(const float* row, i64 d) {
  Vec squares = {};
  float ends = 0;
  i64 c = 0;
  for (; c + LANES <= d; c += LANES) squares += load(row + c) * load(row + c);
  for (; c < d; c++) ends += row[c] * row[c];
  return total(squares) + ends;
}

inline uint16_t half_of(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return uint16_t((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

}  // namespace

EXPORT int top_ids(int threads, const float* scores, i64 stride, i64 n, i64 m, i64 k, i64* out) {
  i64 groups = (std::max<i64>(4 * k, 64) + LANES - 1) / LANES * LANES;
  if (4 * groups > m) groups = 0;  // the row is short enough to look at all of it
  deal(threads, n, rows_of(m), [=](i64 first, i64 last) {
    Candidates found;
    const i64 room = std::max<i64>(8 * k, 512) + 64;
    found.keys.resize(room), found.ids.resize(room);
    std::vector<float> best(groups);
    for (i64 t = first; t < last; t++) top_of_row(scores + t * stride, m, k, groups, best.data(), found, out + t * k);
  });
  return 0;
}

EXPORT int above(int threads, const float* scores, i64 stride, i64 n, i64 m, const float* cuts, i64 each, i64 capacity,
                 i64* counts, i64* places, i64* count) {
  const i64 words = (m + 63) / 64;
  std::vector<uint64_t> bits(n * words);  // of every entry, so that the scores are read once
  std::vector<i64> starts(n + 1);
  deal(threads, n, rows_of(m), [&](i64 first, i64 last) {
    for (i64 t = first; t < last; t++) {
      const float* s = scores + t * stride;
      uint64_t* word = bits.data() + t * words;
      i64 c = 0, found = 0;
      for (; c + 64 <= m; c += 64) {
        *word = over_64<false>(s + c, each ? cuts + c : cuts, each);
        found += __builtin_popcountll(*word++);
      }
      for (; c < m; c++) {
        const uint64_t bit = !(s[c] <= cuts[each ? c : 0]);
        *word |= bit << (c % 64), found += bit;
      }
      starts[t + 1] = found;
    }
  });
  for (i64 t = 0; t < n; t++) {
    starts[t + 1] += starts[t];
    counts[t] = std::min(starts[t + 1], capacity) - std::min(starts[t], capacity);
  }
  *count = starts[n];
  for (i64 e = starts[n]; e < capacity; e++) places[e] = -1;
  deal(threads, n, rows_of(m), [&](i64 first, i64 last) {
    for (i64 t = first; t < last; t++)
      for (i64 w = 0, e = starts[t], end = e + counts[t]; e < end; w++)
        for (uint64_t word = bits[t * words + w]; word && e < end; word &= word - 1)
          places[e++] = t * m + w * 64 + __builtin_ctzll(word);
  });
  return 0;
}

EXPORT int decode(int threads, i64 n, i64 m, i64 d, i64 nnz, const i64* offsets, const i64* ids, const float* values,
                  const float* weight, float* out) {
  const Codes codes{offsets, ids, weight, n, m, d, nnz};
  if (!codes.fine()) return 1;
  deal(threads, n, 1, [&](i64 t, i64) {
    std::memset(out + t * d, 0, 4 * d);
    codes.add_codes(t, values, 1, out + t * d);
  });
  return 0;
}

EXPORT int products(int threads, i64 n, i64 m, i64 d, i64 nnz, const i64* offsets, const i64* ids, const float* rows,
                    const float* weight, float* out) {
  const Codes codes{offsets, ids, weight, n, m, d, nnz};
  if (!codes.fine()) return 1;
  deal(threads, n, 1, [&](i64 t, i64) { codes.multiply(t, rows + t * d, out); });
  return 0;
}

EXPORT int errors(int threads, i64 n, i64 m, i64 d, i64 nnz, const i64* offsets, const i64* ids, const float* values,
                  const float* weight, const float* rest, i64 rest_stride, const float* target, float* error,
                  float* out) {
  const Codes codes{offsets, ids, weight, n, m, d, nnz};
  if (!codes.fine()) return 1;
  deal(threads, n, 1, [&](i64 t, i64) {
    float* __restrict__ e = error + t * d;
    const float *x = target + t * d, *r = rest + t * rest_stride;
    for (i64 c = 0; c < d; c++) e[c] = x[c] - r[c];
    codes.add_codes(t, values, -1, e);
    codes.multiply(t, e, out);
  });
  return 0;
}

EXPORT int by_latent(i64 n, i64 m, i64 nnz, const i64* offsets, const i64* ids, i64* starts, i32* order, i32* tokens) {
  if (!ordered(offsets, n, nnz) || !inside(ids, nnz, m)) return 1;
  std::memset(starts, 0, 8 * (m + 1));
  i64* next = starts + 1;  // where the next entry of a latent goes; in the end, where those of the next latent begin
  for (i64 e = 0; e < nnz; e++) next[ids[e]]++;
  for (i64 j = 0, sum = 0; j < m; j++) {
    const i64 count = next[j];
    next[j] = sum, sum += count;
  }
  for (i64 t = 0; t < n; t++)
    for (i64 e = offsets[t]; e < offsets[t + 1]; e++) {
      const i64 place = next[ids[e]]++;
      order[place] = i32(e), tokens[place] = i32(t);
    }
  return 0;
}

EXPORT int weight_gradient(int threads, i64 n, i64 m, i64 d, i64 nnz, const i64* starts, const i32* order,
                           const i32* tokens, const float* coefficients, const float* rows, float* out,
                           double* squares) {
  if (!ordered(starts, m, nnz) || !inside(order, nnz, nnz) || !inside(tokens, nnz, n)) return 1;
  const Gradient gradient{starts, order, tokens, coefficients, rows, d, out};
  std::vector<float> sums(m);
  const i64 most = std::max<i64>(512, nnz / (8 * threads)), wide = HELD * LANES, parts = (d + wide - 1) / wide;
  std::vector<i64> hot;  // latents that would keep one thread busy alone: their columns are dealt
  if (threads > 1)
    for (i64 j = 0; j < m; j++) if (starts[j + 1] - starts[j] > most) hot.push_back(j);
  deal(threads, i64(hot.size()) * parts, 1, [&](i64 i, i64) {
    Vec unused = {};
    float ends = 0;
    gradient.columns(hot[i / parts], i % parts * wide, unused, ends);
  });
  deal(threads, m, rows_of(d), [&](i64 first, i64 last) {
    for (i64 j = first; j < last; j++) {
      const bool done = threads > 1 && starts[j + 1] - starts[j] > most;
      sums[j] = done ? squares_of(out + j * d, d) : gradient.row(j);
    }
  });
  *squares = 0;
  for (i64 j = 0; j < m; j++) *squares += sums[j];
  return 0;
}

EXPORT int adam(int threads, i64 m, i64 d, float* weight, const float* gradient, float* mean, float* square,
                double rate, double beta1, double beta2, double eps_, const float* step, const float* scale_,
                const bool* applies, const float* along, i64 unit, uint16_t* half, const bool* touched) {
  if (!*applies) return 0;
  const float scale = *scale_, b2 = float(beta2), a1 = float(1 - beta1), a2 = float(1 - beta2);
  const float size = float(rate / (1 - std::pow(beta1, double(*step)))), eps = float(eps_);
  const float root = float(std::sqrt(1 - std::pow(beta2, double(*step))));
  deal(threads, m, rows_of(d), [=](i64 first, i64 last) {
    for (i64 j = first; j < last; j++) {
      if (touched && !touched[j]) continue;
      float* __restrict__ w = weight + j * d;
      const float* __restrict__ g = gradient + j * d;
      float *__restrict__ p = mean + j * d, *__restrict__ q = square + j * d;
      const float out = along ? along[j] * scale : 0;
      for (i64 c = 0; c < d; c++) {
        const float x = g[c] * scale - out * w[c], u = p[c] + a1 * (x - p[c]), v = b2 * q[c] + a2 * x * x;
        p[c] = u, q[c] = v;
        w[c] -= size * u / (std::sqrt(v) / root + eps);
      }
      if (unit) {
        const float norm = std::max(std::sqrt(squares_of(w, d)), 1e-30f);
        for (i64 c = 0; c < d; c++) w[c] /= norm;
      }
      if (half) for (i64 c = 0; c < d; c++) half[j * d + c] = half_of(w[c]);
    }
  });
  return 0;
}
