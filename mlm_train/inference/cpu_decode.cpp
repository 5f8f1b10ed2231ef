// One token through a layer, in bfloat16 on a CPU. See cpu_decode.py for its caller, and for why.
//
// Values are rounded to bfloat16 where the operations of model/block.py round them; sums are in another order.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>

namespace {

using bf16 = uint16_t;

inline float value(bf16 stored) {
  uint32_t bits = uint32_t(stored) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline bf16 stored(float value) { // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value)
    return 0x7fc0;
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float rounded(float exact) { return value(stored(exact)); }

// e^x for -87 <= x <= 88, beyond them that of the bound; in a form that compilers vectorise: 2^n times the polynomial
// of Cephes' expf (error 2e-7).
inline float exponential(float given) {
  float x = given > -87.0f ? std::min(given, 88.0f) : -87.0f; // also for NaN
  float n = std::floor(x * 1.44269504f + 0.5f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1;
  uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return given != given ? given : p * power;
}

constexpr long STEP = 128;   // elements of each of four rows between two prefetches
constexpr long AHEAD = 1024; // elements from one that is read to the one that is prefetched
constexpr long LEAST = 32;   // rows that a thread takes at once

// Dot products of x with four rows of n elements; `next`: what to prefetch meanwhile.
inline void dot4(const bf16 *const rows[4], const bf16 *const next[4], const float *x, long n, float out[4]) {
  const bf16 *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  float s = 0, t = 0, u = 0, v = 0;
  for (long start = 0; start < n; start += STEP) {
    long stop = std::min(start + STEP, n);
    for (long i = start; i < stop; i += 32)
      for (int row = 0; row < 4; row++)
        __builtin_prefetch(next[row] + i);
    for (long i = start; i < stop; i++) {
      s += value(a[i]) * x[i];
      t += value(b[i]) * x[i];
      u += value(c[i]) * x[i];
      v += value(d[i]) * x[i];
    }
  }
  out[0] = s, out[1] = t, out[2] = u, out[3] = v;
}

// The same for rows each of which is followed by what is read after it.
inline void dot4(const bf16 *const rows[4], const float *x, long n, float out[4]) {
  const bf16 *next[4] = {rows[0] + AHEAD, rows[1] + AHEAD, rows[2] + AHEAD, rows[3] + AHEAD};
  dot4(rows, next, x, n, out);
}

// Rows that the threads of a parallel region share, each taking some as often as it can: one may be slower.
struct Shared {
  std::atomic<long> taken{0};

  // The next `size` rows from `begin` on, a multiple of 4 but for the last; false where none is left.
  bool take(long count, long &begin, long &size) {
    begin = taken.load(std::memory_order_relaxed);
    do {
      size = std::max((count - begin) / omp_get_num_threads() / 4 * 4, LEAST);
      if (begin + size + LEAST > count)
        size = count - begin;
    } while (size > 0 && !taken.compare_exchange_weak(begin, begin + size, std::memory_order_relaxed));
    return size > 0;
  }
};

// finish(row, weight[row] . x) for this thread's rows: memory is read fastest in four places, each from its start on.
template <class Finish>
inline void product(Shared &shared, const bf16 *weight, const float *x, long count, long n, Finish finish) {
  for (long begin, size; shared.take(count, begin, size);) {
    const long part = (size + 3) / 4;
    for (long at = 0; at < part; at++) {
      const bf16 *rows[4];
      for (long i = 0; i < 4; i++)
        rows[i] = weight + (begin + std::min(i * part + at, size - 1)) * n;
      float out[4];
      dot4(rows, x, n, out);
      for (long i = 0; i < 4 && i * part + at < size; i++)
        finish(begin + i * part + at, out[i]);
    }
  }
}

// finish(row, weight[row] . x, weight[count + row] . x) for this thread's rows.
template <class Finish>
inline void products(Shared &shared, const bf16 *weight, const float *x, long count, long n, Finish finish) {
  for (long begin, size; shared.take(count, begin, size);) {
    const long part = (size + 1) / 2;
    for (long at = 0; at < part; at++) {
      const bf16 *first = weight + (begin + at) * n, *second = weight + (begin + std::min(part + at, size - 1)) * n;
      const bf16 *rows[4] = {first, second, first + count * n, second + count * n};
      float out[4];
      dot4(rows, x, n, out);
      finish(begin + at, out[0], out[2]);
      if (part + at < size)
        finish(begin + part + at, out[1], out[3]);
    }
  }
}

void rms_norm(const float *x, const bf16 *weight, float eps, long n, float *out) {
  float sum = 0;
  for (long i = 0; i < n; i++)
    sum += x[i] * x[i];
  float factor = 1 / std::sqrt(sum / n + eps);
  for (long i = 0; i < n; i++)
    out[i] = rounded(x[i] * factor * value(weight[i]));
}

void rotate(const float *x, const bf16 *cos, const bf16 *sin, long dim, float *out) {
  const long half = dim / 2;
  for (long i = 0; i < half; i++) {
    float low = x[i], high = x[half + i];
    out[i] = rounded(rounded(low * value(cos[i])) + high * value(sin[i]));
    out[half + i] = rounded(rounded(high * value(cos[half + i])) + low * value(sin[half + i]));
  }
}

struct Layer {
  int64_t hidden, heads, kv_heads, head_dim, ffn; // ffn: 0 without a computed FFN
  int64_t gated, after_attention;
  float eps, alpha;
  const bf16 *norm, *qkv, *out, *ffn_norm, *up, *down;
};

struct Model {
  const Layer *layers;
  const bf16 *norm, *head; // head: [vocabulary, hidden]
  int64_t vocabulary;
  float eps;
};

struct Token {
  int64_t columns, threads;           // columns: those cached before this one
  int64_t head_stride, layer_stride;  // elements between the keys of two heads, and of two layers
  float *x;                           // [hidden], in and out
  bf16 *keys, *values;                // of the first layer [kv_heads, columns, head_dim]
  const bf16 *cos, *sin;              // [head_dim]; the first half of sin is negated
  const bf16 *memory;                 // FFN-M's output in each layer [layers, hidden]; null: none, or not yet there
  float *scratch;                     // [2 * (heads + kv_heads) * head_dim + hidden + ffn]
};

// This thread's heads; appends the token's keys and values to those of layer `number`.
void attend(const Layer &layer, const Token &token, long number, const float *qkv, float *out) {
  const long dim = layer.head_dim, columns = token.columns, group = layer.heads / layer.kv_heads;
  std::vector<float> buffer(columns + 1 + 3 * dim);
  float *scores = buffer.data(), *query = scores + columns + 1, *key = query + dim, *sum = key + dim;
  const long quarter = columns / 4, ahead = AHEAD / dim;
  // Column `at` of each quarter of a head's keys or values; past them, those of what is read after it.
  auto column_of = [&](const bf16 *head, const bf16 *after, long at, const bf16 *rows[4]) {
    for (long i = 0; i < 4; i++)
      rows[i] = (at < quarter ? head : after) + (i * quarter + (at < quarter ? at : at - quarter)) * dim;
  };
  const float scale = 1 / std::sqrt(float(dim));
#pragma omp for nowait
  for (long head = 0; head < layer.heads; head++) {
    const long kv = head / group;
    const long start = number * token.layer_stride + kv * token.head_stride;
    bf16 *keys = token.keys + start, *values = token.values + start;
    const float *v = qkv + (layer.heads + layer.kv_heads + kv) * dim;
    rotate(qkv + head * dim, token.cos, token.sin, dim, query);
    rotate(qkv + (layer.heads + kv) * dim, token.cos, token.sin, dim, key);
    for (long i = 0; i < dim; i++)
      query[i] *= scale;
    for (long column = 0; column < quarter; column++) {
      const bf16 *rows[4], *next[4];
      column_of(keys, values, column, rows);
      column_of(keys, values, column + ahead, next);
      float dots[4];
      dot4(rows, next, query, dim, dots);
      for (long i = 0; i < 4; i++)
        scores[i * quarter + column] = dots[i];
    }
    for (long column = 4 * quarter; column < columns; column++) {
      float score = 0;
      for (long i = 0; i < dim; i++)
        score += query[i] * value(keys[column * dim + i]);
      scores[column] = score;
    }
    float own = 0;
    for (long i = 0; i < dim; i++)
      own += query[i] * key[i];
    scores[columns] = own;
    float most = own, total = 0;
#pragma omp simd reduction(max : most)
    for (long column = 0; column < columns; column++)
      most = scores[column] > most ? scores[column] : most;
#pragma omp simd reduction(+ : total)
    for (long column = 0; column <= columns; column++)
      total += scores[column] = exponential(scores[column] - most);
    std::fill(sum, sum + dim, 0.0f);
    for (long column = 0; column < quarter; column++) {
      const bf16 *rows[4], *next[4];
      column_of(values, keys + token.head_stride, column, rows);
      column_of(values, keys + token.head_stride, column + ahead, next);
      float p[4];
      for (long i = 0; i < 4; i++) {
        p[i] = scores[i * quarter + column];
        for (long j = 0; j < dim; j += 32)
          __builtin_prefetch(next[i] + j);
      }
      for (long i = 0; i < dim; i++)
        sum[i] += p[0] * value(rows[0][i]) + p[1] * value(rows[1][i]) + p[2] * value(rows[2][i]) + p[3] * value(rows[3][i]);
    }
    for (long column = 4 * quarter; column < columns; column++)
      for (long i = 0; i < dim; i++)
        sum[i] += scores[column] * value(values[column * dim + i]);
    for (long i = 0; i < dim; i++)
      out[head * dim + i] = rounded((sum[i] + scores[columns] * v[i]) / total);
    if (head % group == 0) // no other head reads this column
      for (long i = 0; i < dim; i++) {
        keys[columns * dim + i] = stored(key[i]);
        values[columns * dim + i] = stored(v[i]);
      }
  }
}

// A row of the residual stream after layer `number`, to which FFN-M's output is added where it is there.
inline float recalled(const Layer &layer, const Token &token, long number, long row, float x) {
  if (!token.memory || layer.alpha == 0)
    return x;
  return rounded(x + rounded(layer.alpha * value(token.memory[number * layer.hidden + row])));
}

constexpr long PRODUCTS = 4; // of a layer, at most

// A layer, by all threads of a parallel region.
void run(const Layer &layer, const Token &token, long number, std::vector<float> &normed, Shared *shared) {
  const long hidden = layer.hidden, width = layer.heads * layer.head_dim;
  const long qkv_width = width + 2 * layer.kv_heads * layer.head_dim;
  float *x = token.x, *qkv = token.scratch, *attended = qkv + qkv_width, *y = attended + width, *inner = y + hidden;
  auto finish = [&](long row, float sum) { x[row] = recalled(layer, token, number, row, sum); };
  rms_norm(x, layer.norm, layer.eps, hidden, normed.data());
  product(shared[0], layer.qkv, normed.data(), qkv_width, hidden, [&](long row, float dot) { qkv[row] = rounded(dot); });
#pragma omp barrier
  attend(layer, token, number, qkv, attended);
#pragma omp barrier
  product(shared[1], layer.out, attended, hidden, width, [&](long row, float dot) {
    float sum = rounded(x[row] + rounded(dot));
    layer.ffn ? void(y[row] = sum) : finish(row, sum);
  });
#pragma omp barrier
  if (!layer.ffn)
    return;
  rms_norm(layer.after_attention ? y : x, layer.ffn_norm, layer.eps, hidden, normed.data());
  if (layer.gated)
    products(shared[2], layer.up, normed.data(), layer.ffn, hidden, [&](long row, float gate, float up) {
      gate = rounded(gate);
      inner[row] = rounded(rounded(gate / (1 + exponential(-gate))) * rounded(up));
    });
  else
    product(shared[2], layer.up, normed.data(), layer.ffn, hidden, [&](long row, float dot) { inner[row] = rounded(dot); });
#pragma omp barrier
  product(shared[3], layer.down, inner, hidden, layer.ffn,
          [&](long row, float dot) { finish(row, rounded(y[row] + rounded(dot))); });
#pragma omp barrier
}

} // namespace

// Layers `first` to `last` - 1; after the last one, where `logits` are wanted, the final norm and the head. Layer
// `first` - 1 ran before FFN-M's output was there, which is added to its own first.
extern "C" void decode(const Model *model, int64_t first, int64_t last, const Token *token, bf16 *logits) {
  const long hidden = model->layers->hidden;
  for (long row = 0; first && row < hidden; row++)
    token->x[row] = recalled(model->layers[first - 1], *token, first - 1, row, token->x[row]);
  std::vector<Shared> shared(PRODUCTS * (last - first) + 1);
#pragma omp parallel num_threads(token->threads)
  {
    std::vector<float> normed(hidden);
    for (long number = first; number < last; number++)
      run(model->layers[number], *token, number, normed, &shared[PRODUCTS * (number - first)]);
    if (logits) {
      rms_norm(token->x, model->norm, model->eps, hidden, normed.data());
      product(shared.back(), model->head, normed.data(), model->vocabulary, hidden,
              [&](long row, float dot) { logits[row] = stored(dot); });
    }
  }
}
