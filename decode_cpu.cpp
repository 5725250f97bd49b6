// The four operations of a decoding step on a CPU, for a few rows x (activations, fp32) at one time.
//
// compiled.py compiles this file once with g++, decode.py calls it through ctypes; its plain reference is model.py. A
// step reads every weight once, so `linear` is written to read them as fast as memory gives them: in the format they
// are stored in, turned into fp32 in registers, summed in fp32. Vector types are GCC's, so the same lines become AVX2,
// AVX-512 or NEON.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 8;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

constexpr int64_t BLOCK = 64;            // 4-bit weights that share one scale
constexpr int64_t WORTH_THREADS = 1 << 15;  // multiplications below which waking other threads costs more than it saves

enum Format : int64_t { FP32, BF16, INT8, FOURBIT };

template <class V>
V read(const void *address) {
    V value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

float sum(Floats v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

}  // namespace

// A weight (out, in), row by row, as model.py or quantize.py stores it. decode.py has the same fields in this order.
struct Matrix {
    int64_t format, out, in;
    const void *data;
    const float *block_scales;  // FOURBIT: one for each BLOCK weights; `in` is a multiple of BLOCK
    const float *values;        // FOURBIT: what the 16 codes stand for
    const float *row_scales;    // (out,) or null: y = row_scale * (w . x) + bias
    const float *bias;          // (out,) or null
};

namespace {

// LANES weights of a row from column k on, as fp32. Where AVX2 has an instruction that GCC does not find, it is named.
template <int64_t FORMAT>
inline Floats load(const Matrix &m, int64_t row, int64_t k) {
    int64_t at = row * m.in + k;
    if constexpr (FORMAT == FP32) return read<Floats>((const float *)m.data + at);
    if constexpr (FORMAT == BF16) {  // bf16 is the upper half of an fp32
        auto halves = read<Shorts>((const uint16_t *)m.data + at);
#ifdef __AVX2__
        return (Floats)((Words)_mm256_cvtepu16_epi32((__m128i)halves) << 16);
#else
        return (Floats)(__builtin_convertvector(halves, Words) << 16);
#endif
    }
    if constexpr (FORMAT == INT8) {
#ifdef __AVX2__
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const int8_t *)m.data + at))));
#else
        return __builtin_convertvector(read<Bytes>((const int8_t *)m.data + at), Floats);
#endif
    }
}

// 4-bit codes are looked up BLOCK at a time, and come out in an order of their own: the n-th
// is the weight `fourbit_place(n)`. The sum does not mind, if the activations are in that order too.
inline int64_t fourbit_place(int64_t n) {
    int64_t v = n / LANES % 8, t = n % LANES;  // vector and place in it
    return n / BLOCK * BLOCK + 2 * (16 * (t / 4) + 4 * (v % 4) + t % 4) + v / 4;
}

// What the 16 codes stand for, laid out for `look_up`.
struct Values {
    const float *values;
#ifdef __AVX2__
    __m256i bytes[4];  // byte i of each of the 16 fp32 values, twice
#endif
    explicit Values(const float *v) : values(v) {
#ifdef __AVX2__
        for (int i = 0; i < 4; i++) {
            alignas(16) char table[16];
            for (int code = 0; code < 16; code++) table[code] = ((const char *)v)[4 * code + i];
            bytes[i] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)table));
        }
#endif
    }
};

// The BLOCK weights of `codes` without their scale. Two codes a byte, the first in its upper half.
inline void look_up(const uint8_t *codes, const Values &table, Floats (&weights)[BLOCK / LANES]) {
#ifdef __AVX2__  // a shuffle looks up one byte of 32 values; four of them and interleaving make the values whole
    __m256i pairs = read<__m256i>(codes), low_half = _mm256_set1_epi8(15);
    for (int half = 0; half < 2; half++) {
        __m256i code = _mm256_and_si256(half ? pairs : _mm256_srli_epi16(pairs, 4), low_half), part[4];
        for (int i = 0; i < 4; i++) part[i] = _mm256_shuffle_epi8(table.bytes[i], code);
        __m256i lower[2] = {_mm256_unpacklo_epi8(part[0], part[1]), _mm256_unpackhi_epi8(part[0], part[1])};
        __m256i upper[2] = {_mm256_unpacklo_epi8(part[2], part[3]), _mm256_unpackhi_epi8(part[2], part[3])};
        for (int i = 0; i < 2; i++) {
            weights[4 * half + 2 * i] = (Floats)_mm256_unpacklo_epi16(lower[i], upper[i]);
            weights[4 * half + 2 * i + 1] = (Floats)_mm256_unpackhi_epi16(lower[i], upper[i]);
        }
    }
#else
    for (int64_t v = 0; v < BLOCK / LANES; v++)
        for (int64_t t = 0; t < LANES; t++) {
            int64_t place = fourbit_place(v * LANES + t);
            weights[v][t] = table.values[place % 2 ? codes[place / 2] & 15 : codes[place / 2] >> 4];
        }
#endif
}

// One weight, for the columns that are left over when `in` is no multiple of LANES (FOURBIT has none).
inline float load_one(const Matrix &m, int64_t row, int64_t k) {
    int64_t at = row * m.in + k;
    if (m.format == FP32) return ((const float *)m.data)[at];
    if (m.format == INT8) return ((const int8_t *)m.data)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)m.data)[at] << 16;
    return read<float>(&bits);
}

void store(const Matrix &m, int64_t row, float value, float *y, bool add) {
    if (m.row_scales) value *= m.row_scales[row];
    if (m.bias) value += m.bias[row];
    y[row] = add ? y[row] + value : value;
}

template <int64_t FORMAT>
constexpr int64_t BITS = FORMAT == FP32 ? 32 : FORMAT == BF16 ? 16 : FORMAT == INT8 ? 8 : 4;

// The next rows of a weight, to arrive while the processor multiplies by these.
inline void prefetch(const void *next, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)next + i);
}

// While O rows are multiplied, `count` columns from k on, let the same share of the O rows after the next O arrive: the
// processor's own guess does not reach that far.
template <int64_t FORMAT, int O>
inline void prefetch_ahead(const Matrix &m, int64_t row, int64_t k, int64_t count) {
    auto from = (const char *)m.data + ((row + 2 * O) * m.in + k * O) * BITS<FORMAT> / 8;
    prefetch(from, O * count * BITS<FORMAT> / 8);
}

// O weights from `row` on times one activation x (in,), for FOURBIT in the order of `fourbit_place`.
template <int64_t FORMAT, int O>
void one_activation(const Matrix &m, int64_t row, const float *x, float *y, bool add) {
    Floats totals[O] = {};
    int64_t whole = m.in / LANES * LANES;
    if constexpr (FORMAT == FOURBIT) {
        Values table(m.values);
        for (int64_t k = 0; k < m.in; k += BLOCK) {
            prefetch_ahead<FORMAT, O>(m, row, k, BLOCK);
            for (int o = 0; o < O; o++) {
                int64_t at = (row + o) * m.in + k;
                Floats weights[BLOCK / LANES], block = {};
                look_up((const uint8_t *)m.data + at / 2, table, weights);
                for (int64_t v = 0; v < BLOCK / LANES; v++) block += weights[v] * read<Floats>(x + k + v * LANES);
                totals[o] += block * m.block_scales[at / BLOCK];
            }
        }
    } else {
        for (int64_t k = 0; k < whole; k += LANES) {
            prefetch_ahead<FORMAT, O>(m, row, k, LANES);
            Floats value = read<Floats>(x + k);
            for (int o = 0; o < O; o++) totals[o] += load<FORMAT>(m, row + o, k) * value;
        }
    }
    for (int o = 0; o < O; o++) {
        float total = sum(totals[o]);
        for (int64_t k = whole; k < m.in; k++) total += load_one(m, row + o, k) * x[k];
        store(m, row + o, total, y, add);
    }
}

// O weights (O, in) in fp32 times V x LANES activations, which lie as columns: x (in, V * LANES) gives y (O, V * LANES).
// With O = 6 and V = 2 the 12 sums, 2 activations and 1 weight stay in AVX2's 16 registers.
template <int O, int V>
void many_activations(const float *weights, int64_t in, const float *x, float *y) {
    Floats totals[O][V] = {};
    for (int64_t k = 0; k < in; k++) {
        Floats values[V];
        for (int v = 0; v < V; v++) values[v] = read<Floats>(x + (k * V + v) * LANES);
        for (int o = 0; o < O; o++)
            for (int v = 0; v < V; v++) totals[o][v] += weights[o * in + k] * values[v];
    }
    std::memcpy(y, totals, sizeof totals);
}

// bf16 of an fp32, to the nearest, ties to even.
uint32_t to_bf16(float value) {
    uint32_t bits = read<uint32_t>(&value);
    return value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

typedef float Sums __attribute__((vector_size(8 * LANES)));  // of up to 2 LANES activations
typedef uint32_t Pairs __attribute__((vector_size(8 * LANES)));

// sums + the products of two bf16 in each word, where the processor has them in one instruction.
inline Sums add_pairs(Sums sums, Pairs a, Pairs b) {
#ifdef __AVX512BF16__
    return (Sums)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += (Sums)(a << 16) * (Sums)(b << 16);
    return sums + (Sums)(a & 0xffff0000) * (Sums)(b & 0xffff0000);
#endif
}

// O weights in bf16 from `row` on times 2 LANES activations in bf16, x (in / 2, 2 LANES) pairs: y (O, 2 LANES). Two
// sums for each row, since an instruction takes several times as long as the next one has to wait.
template <int O>
void many_in_bf16(const Matrix &m, int64_t row, const uint32_t *x, float *y) {
    auto weights = (const uint16_t *)m.data + row * m.in;
    Sums totals[O][2] = {};
    for (int64_t k = 0; k < m.in; k += 4) {
        prefetch_ahead<BF16, O>(m, row, k, 4);
        for (int half = 0; half < 2; half++) {
            Pairs values = read<Pairs>(x + (k / 2 + half) * 2 * LANES);
            for (int o = 0; o < O; o++) {
                Pairs weight = Pairs{} + read<uint32_t>(weights + o * m.in + k + 2 * half);
                totals[o][half] = add_pairs(totals[o][half], values, weight);
            }
        }
    }
    for (int o = 0; o < O; o++) totals[o][0] += totals[o][1];
    for (int o = 0; o < O; o++) std::memcpy(y + o * 2 * LANES, &totals[o][0], sizeof(Sums));
}

// One row of a weight as fp32: target (in,)
template <int64_t FORMAT>
void unpack(const Matrix &m, int64_t row, float *target) {
    int64_t whole = m.in / LANES * LANES;
    if constexpr (FORMAT == FOURBIT) {
        Values table(m.values);
        for (int64_t k = 0; k < m.in; k += BLOCK) {
            int64_t at = row * m.in + k;
            Floats weights[BLOCK / LANES];
            look_up((const uint8_t *)m.data + at / 2, table, weights);
            for (auto &w : weights) w *= m.block_scales[at / BLOCK];
            std::memcpy(target + k, weights, sizeof weights);
        }
    } else {
        for (int64_t k = 0; k < whole; k += LANES) {
            Floats values = load<FORMAT>(m, row, k);
            std::memcpy(target + k, &values, sizeof values);
        }
    }
    for (int64_t k = whole; k < m.in; k++) target[k] = load_one(m, row, k);
}

constexpr int TOGETHER = 6;  // rows of a weight that are worked on at one time

// Rows [row, end), at most TOGETHER, of one weight times the activations: one, or V * LANES columns made of `count`.
template <int64_t FORMAT>
void some_rows(const Matrix &m, int64_t row, int64_t end, const float *x, int64_t V, float *y, int64_t y_stride,
               int64_t count, bool add) {
    if (V == 0) {
        if (end - row == TOGETHER) return one_activation<FORMAT, TOGETHER>(m, row, x, y, add);
        for (; row < end; row++) one_activation<FORMAT, 1>(m, row, x, y, add);
        return;
    }
    static thread_local std::vector<float> unpacked, product;
    unpacked.resize(TOGETHER * m.in);
    product.resize(TOGETHER * 2 * LANES);
    const float *weights = unpacked.data();
    if (FORMAT == FP32 && end - row == TOGETHER) weights = (const float *)m.data + row * m.in;
    else
        for (int64_t o = 0; o < end - row; o++) unpack<FORMAT>(m, row + o, &unpacked[o * m.in]);
    prefetch((const char *)m.data + end * m.in * BITS<FORMAT> / 8, TOGETHER * m.in * BITS<FORMAT> / 8);
    (V == 1 ? many_activations<TOGETHER, 1> : many_activations<TOGETHER, 2>)(weights, m.in, x, product.data());
    for (int64_t b = 0; b < count; b++)
        for (int64_t o = 0; o < end - row; o++)
            store(m, row + o, product[o * V * LANES + b], y + b * y_stride, add);
}

// The same for rows of a weight in bf16 times activations in bf16, laid out as for `many_in_bf16`.
void some_rows_in_bf16(const Matrix &m, int64_t row, const uint32_t *x, float *y, int64_t y_stride, int64_t count,
                       bool add) {
    int64_t end = std::min(m.out, row + TOGETHER);
    float product[TOGETHER * 2 * LANES];
    if (end - row == TOGETHER) many_in_bf16<TOGETHER>(m, row, x, product);
    else
        for (int64_t o = 0; o < end - row; o++) many_in_bf16<1>(m, row + o, x, product + o * 2 * LANES);
    for (int64_t b = 0; b < count; b++)
        for (int64_t o = 0; o < end - row; o++) store(m, row + o, product[o * 2 * LANES + b], y + b * y_stride, add);
}

void some_rows_of_any(const Matrix &m, int64_t row, const float *x, int64_t V, float *y, int64_t y_stride,
                      int64_t count, bool add) {
    auto work = m.format == FP32   ? some_rows<FP32>
                : m.format == BF16 ? some_rows<BF16>
                : m.format == INT8 ? some_rows<INT8>
                                   : some_rows<FOURBIT>;
    work(m, row, std::min(m.out, row + TOGETHER), x, V, y, y_stride, count, add);
}

inline float dot(const float *a, const float *b, int64_t n) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += a[i] * b[i];
    return total;
}

}  // namespace

extern "C" {

// y (count, sum of out) = x (count, in) times each weight, transposed, side by side; with `add` on top of what y holds.
// in_bf16: round activations to bf16 if the weights are, for several rows and a processor that multiplies bf16 fast.
void linear(const Matrix *matrices, int64_t matrix_count, const float *x, int64_t x_stride, float *y, int64_t y_stride,
            int64_t count, int64_t add, int64_t in_bf16, int64_t threads) {
    static thread_local std::vector<float> columns;
    static thread_local std::vector<uint32_t> pairs;
    for (; count > 2 * LANES; count -= 2 * LANES, x += 2 * LANES * x_stride, y += 2 * LANES * y_stride)
        linear(matrices, matrix_count, x, x_stride, y, y_stride, 2 * LANES, add, in_bf16, threads);
    int64_t in = matrices[0].in;
    in_bf16 = in_bf16 && in % 4 == 0 && matrices[0].format == BF16;
    int64_t V = count == 1 && !in_bf16 ? 0 : (count + LANES - 1) / LANES, width = V ? V * LANES : 1, work = 0;
    bool fourbit = matrices[0].format == FOURBIT;
    if (in_bf16) {
        pairs.assign(in / 2 * 2 * LANES, 0);
        for (int64_t b = 0; b < count; b++)
            for (int64_t k = 0; k < in; k++)
                pairs[k / 2 * 2 * LANES + b] |= to_bf16(x[b * x_stride + k]) << 16 * (k % 2);
    } else if (V || fourbit) {
        columns.assign(in * width, 0);
        for (int64_t k = 0; k < in; k++) {
            const float *from = x + (fourbit ? fourbit_place(k) : k);
            for (int64_t b = 0; b < count; b++) columns[k * width + b] = from[b * x_stride];
        }
        x = columns.data();
    }
    for (int64_t i = 0; i < matrix_count; i++) work += matrices[i].out * in * count;
    const uint32_t *paired = pairs.data();  // this thread's, for all
#pragma omp parallel num_threads(threads) if (work > WORTH_THREADS)
    {
        float *target = y;
        for (int64_t i = 0; i < matrix_count; i++) {
#pragma omp for schedule(static) nowait
            for (int64_t row = 0; row < matrices[i].out; row += TOGETHER)
                if (in_bf16) some_rows_in_bf16(matrices[i], row, paired, target, y_stride, count, add);
                else some_rows_of_any(matrices[i], row, x, V, target, y_stride, count, add);
            target += matrices[i].out;
        }
    }
}

// y (count, size) = x / rms(x) * weight
void rms_norm(const float *x, int64_t x_stride, const float *weight, double eps, float *y, int64_t y_stride,
              int64_t count, int64_t size) {
    for (int64_t n = 0; n < count; n++, x += x_stride, y += y_stride) {
        float scale = 1 / std::sqrt(dot(x, x, size) / size + (float)eps);
        for (int64_t i = 0; i < size; i++) y[i] = x[i] * scale * weight[i];
    }
}

// y (count, inner) = silu(gate) * up, for x (count, 2 inner) that holds gate and up side by side
void swiglu(const float *x, float *y, int64_t count, int64_t inner, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (count * inner > WORTH_THREADS / 8)
    for (int64_t n = 0; n < count; n++) {
        const float *gate = x + n * 2 * inner, *up = gate + inner;
#pragma omp simd
        for (int64_t i = 0; i < inner; i++) y[n * inner + i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
    }
}
}

namespace {

// Turn a head (d,) to its position; dimension i pairs with i + d/2. `weight` (d,) is Qwen3's norm before it, or null.
void norm_and_rotate(float *head, const float *weight, double eps, const float *cos, const float *sin, int64_t d) {
    if (weight) rms_norm(head, d, weight, eps, head, d, 1, d);
    for (int64_t i = 0; i < d / 2; i++) {
        float first = head[i], second = head[i + d / 2];
        head[i] = first * cos[i] - second * sin[i];
        head[i + d / 2] = second * cos[i] + first * sin[i];
    }
}

// y (d,) = softmax(q . k / sqrt(d)) . v over positions [begin, end) of one head's k and v (S, d)
void attend_head(const float *q, const float *k, const float *v, int64_t begin, int64_t end, int64_t d, float *y) {
    static thread_local std::vector<float> weights;
    weights.resize(end - begin);
    float *weight = weights.data(), largest = -INFINITY, total = 0, scale = 1 / std::sqrt((float)d);
    int64_t n = end - begin;
    for (int64_t s = 0; s < n; s++) {
        weight[s] = dot(q, k + (begin + s) * d, d) * scale;
        largest = std::max(largest, weight[s]);
    }
#pragma omp simd reduction(+ : total)
    for (int64_t s = 0; s < n; s++) {
        weight[s] = std::exp(weight[s] - largest);
        total += weight[s];
    }
    std::fill(y, y + d, 0.0f);
    for (int64_t s = 0; s < n; s++)
        for (int64_t i = 0; i < d; i++) y[i] += weight[s] / total * v[(begin + s) * d + i];
}

}  // namespace

// What attention needs to know of a model and a cache. decode.py has the same fields in this order.
struct Attention {
    int64_t batch, heads, key_heads, d, room;  // room: positions that the cache can hold
    int64_t position;                          // the place of the new position in it
    float *qkv;                                // (batch, (heads + 2 key_heads) d): q, k, v of the new position
    const float *cos, *sin;                    // (room, d/2): of every position
    const int64_t *padding;                    // (batch,): positions at the left of each row that hold nothing
    float *y;                                  // (batch, heads d)
    double eps;
    int64_t threads;
};

extern "C" {

// One new position of one layer: rotate its q and k, put k and v in the cache (batch, key_heads, room, d), attend.
void attend(const Attention *a, float *k_cache, float *v_cache, const float *q_norm, const float *k_norm,
            int64_t window) {
    int64_t position = a->position, d = a->d, H = a->heads, K = a->key_heads, width = (H + 2 * K) * d;
    for (int64_t b = 0; b < a->batch; b++) {
        int64_t turn = (position - a->padding[b]) * (d / 2);
        float *row = a->qkv + b * width;
        for (int64_t h = 0; h < H + K; h++)
            norm_and_rotate(row + h * d, h < H ? q_norm : k_norm, a->eps, a->cos + turn, a->sin + turn, d);
        for (int64_t h = 0; h < K; h++) {
            int64_t place = ((b * K + h) * a->room + position) * d;
            std::memcpy(k_cache + place, row + (H + h) * d, d * sizeof(float));
            std::memcpy(v_cache + place, row + (H + K + h) * d, d * sizeof(float));
        }
    }
    int64_t work = a->batch * H * position * d;
#pragma omp parallel for num_threads(a->threads) if (work > WORTH_THREADS)
    for (int64_t n = 0; n < a->batch * H; n++) {
        int64_t b = n / H, h = n % H, start = (b * K + h / (H / K)) * a->room * d;
        int64_t begin = std::max(a->padding[b], window ? position + 1 - window : 0);
        attend_head(a->qkv + b * width + h * d, k_cache + start, v_cache + start, begin, position + 1, d, a->y + n * d);
    }
}
}
