// The operations of a decoding step on a CPU, for a few rows x (activations, fp32) at one time.
//
// cpp.py compiles this file once with g++, decode.py calls it through ctypes; its plain reference is model.py. A
// step reads every weight once, so `linear` is written to read them as fast as memory gives them: in the format they
// are stored in, turned in registers into what is multiplied, summed in fp32.

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 64;               // 4-bit weights that share one scale
constexpr int64_t WORTH_THREADS = 1 << 15;  // multiplications below which waking other threads costs more than it saves

enum Format : int64_t { IN_FP32, IN_BF16, IN_INT8, IN_FOURBIT };

}  // namespace

// A weight (out, in), row by row, as model.py or quantize.py stores it. decode.py has the same fields in this order.
struct Matrix {
    int64_t format, out, in;
    const void *data;
    const float *block_scales;  // IN_FOURBIT: one for each BLOCK weights; `in` is a multiple of BLOCK
    const float *values;        // IN_FOURBIT: what the 16 codes stand for
    const float *row_scales;    // (out,) or null: y = row_scale * (w . x) + bias
    const float *bias;          // (out,) or null
};

namespace {

Floats from_int8(const int8_t *x) {
#if defined __AVX512F__
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(x)));
#elif defined __AVX2__
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
#else
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    return __builtin_convertvector(read<Bytes>(x), Floats);
#endif
}

// LANES weights of a row from column k on, as fp32.
template <int64_t FORMAT>
inline Floats load(const Matrix &m, int64_t row, int64_t k) {
    int64_t at = row * m.in + k;
    if constexpr (FORMAT == IN_FP32) return load((const float *)m.data + at);
    if constexpr (FORMAT == IN_BF16) return load((const BF16 *)m.data + at);
    if constexpr (FORMAT == IN_INT8) return from_int8((const int8_t *)m.data + at);
}

// 4-bit codes are looked up BLOCK at a time, and come out in an order of their own: the n-th is the weight
// `fourbit_place(n)`. The sum does not mind, if the activations are in that order too.
inline int64_t fourbit_place(int64_t n) {
    int64_t v = n % BLOCK / LANES, t = n % LANES;  // vector and place in it
#ifdef __AVX512F__
    return n / BLOCK * BLOCK + 2 * (16 * (v / 2) + t) + v % 2;
#else
    return n / BLOCK * BLOCK + 2 * (16 * (t / 4) + 4 * (v % 4) + t % 4) + v / 4;
#endif
}

// What the 16 codes stand for, laid out for `look_up`.
struct Values {
    const float *values;
#if defined __AVX512F__
    __m512 all;
    explicit Values(const float *v) : values(v), all(_mm512_loadu_ps(v)) {}
#elif defined __AVX2__
    __m256i bytes[4];  // byte i of each of the 16 fp32 values, twice
    explicit Values(const float *v) : values(v) {
        for (int i = 0; i < 4; i++) {
            alignas(16) char table[16];
            for (int code = 0; code < 16; code++) table[code] = ((const char *)v)[4 * code + i];
            bytes[i] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)table));
        }
    }
#else
    explicit Values(const float *v) : values(v) {}
#endif
};

// The BLOCK weights of `codes` without their scale. Two codes a byte, the first in its upper half.
inline void look_up(const uint8_t *codes, const Values &table, Floats (&weights)[BLOCK / LANES]) {
#if defined __AVX512F__  // a permutation of all 16 values, by the lower four bits of each word
    for (int half = 0; half < 2; half++) {
        __m512i pairs = _mm512_cvtepu8_epi32(read<__m128i>(codes + 16 * half));
        weights[2 * half] = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table.all);
        weights[2 * half + 1] = (Floats)_mm512_permutexvar_ps(pairs, table.all);
    }
#elif defined __AVX2__  // a shuffle looks up one byte of 32 values; four of them and interleaving make the values whole
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

// One weight, for the columns that are left over when `in` is no multiple of LANES (IN_FOURBIT has none).
inline float load_one(const Matrix &m, int64_t row, int64_t k) {
    int64_t at = row * m.in + k;
    if (m.format == IN_FP32) return ((const float *)m.data)[at];
    if (m.format == IN_INT8) return ((const int8_t *)m.data)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)m.data)[at] << 16;
    return read<float>(&bits);
}

void store(const Matrix &m, int64_t row, float value, float *y, bool add) {
    if (m.row_scales) value *= m.row_scales[row];
    if (m.bias) value += m.bias[row];
    y[row] = add ? y[row] + value : value;
}

template <int64_t FORMAT>
constexpr int64_t BITS = FORMAT == IN_FP32 ? 32 : FORMAT == IN_BF16 ? 16 : FORMAT == IN_INT8 ? 8 : 4;

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

// O weights from `row` on times one activation x (in,), for IN_FOURBIT in the order of `fourbit_place`.
template <int64_t FORMAT, int O>
void one_activation(const Matrix &m, int64_t row, const float *x, float *y, bool add) {
    Floats totals[O] = {};
    int64_t whole = m.in / LANES * LANES;
    if constexpr (FORMAT == IN_FOURBIT) {
        Values table(m.values);
        for (int64_t k = 0; k < m.in; k += BLOCK) {
            prefetch_ahead<FORMAT, O>(m, row, k, BLOCK);
            for (int o = 0; o < O; o++) {
                int64_t at = (row + o) * m.in + k;
                Floats weights[BLOCK / LANES], block = {};
                look_up((const uint8_t *)m.data + at / 2, table, weights);
                for (int64_t v = 0; v < BLOCK / LANES; v++) block += weights[v] * load(x + k + v * LANES);
                totals[o] += block * m.block_scales[at / BLOCK];
            }
        }
    } else {
        for (int64_t k = 0; k < whole; k += LANES) {
            prefetch_ahead<FORMAT, O>(m, row, k, LANES);
            Floats value = load(x + k);
            for (int o = 0; o < O; o++) totals[o] += load<FORMAT>(m, row + o, k) * value;
        }
    }
    for (int o = 0; o < O; o++) {
        float total = sum(totals[o]);
        for (int64_t k = whole; k < m.in; k++) total += load_one(m, row + o, k) * x[k];
        store(m, row + o, total, y, add);
    }
}

// One row of a weight: target (in,), for IN_FOURBIT in the order of `fourbit_place`.
template <int64_t FORMAT, class T>
void unpack(const Matrix &m, int64_t row, T *target) {
    if constexpr (FORMAT == IN_FOURBIT) {
        Values table(m.values);
        for (int64_t k = 0; k < m.in; k += BLOCK) {
            int64_t at = row * m.in + k;
            Floats weights[BLOCK / LANES];
            look_up((const uint8_t *)m.data + at / 2, table, weights);
            for (int64_t v = 0; v < BLOCK / LANES; v++)
                store(target + k + v * LANES, weights[v] * m.block_scales[at / BLOCK]);
        }
    } else {
        int64_t whole = m.in / LANES * LANES;
        for (int64_t k = 0; k < whole; k += LANES) store(target + k, load<FORMAT>(m, row, k));
        for (int64_t k = whole; k < m.in; k++) store(target + k, Floats{} + load_one(m, row, k), 1);
    }
}

// Some rows of a weight as T: where they are stored, if they are stored so and all `wanted` are there, else in `target`.
template <int64_t FORMAT, class T>
const T *unpacked(const Matrix &m, int64_t row, int64_t count, int64_t wanted, std::vector<uint32_t> &target) {
    if (FORMAT == (PER_WORD<T> == 1 ? IN_FP32 : IN_BF16) && count == wanted) return (const T *)m.data + row * m.in;
    target.resize(wanted * m.in / PER_WORD<T>);
    for (int64_t o = 0; o < count; o++) unpack<FORMAT>(m, row + o, (T *)target.data() + o * m.in);
    return (const T *)target.data();
}

// Activations (count, in) as a product takes them: one as it is, several as columns of words.
struct Activations {
    int64_t count, width;  // width: `count` filled up to what is computed at one time
    bool in_bf16;
    const void *x;  // (in,) fp32 or (in / PER_WORD, width) words; for IN_FOURBIT in the order of `fourbit_place`
};

constexpr int TOGETHER = 6;  // rows of a weight that one activation is multiplied by at one time

int64_t rows_together(const Activations &a) { return a.width == 1 ? TOGETHER : WHOLE_ROWS; }

// Rows [row, end) of a weight, at most as many as go together, times several activations.
template <int64_t FORMAT, class T>
void several_activations(const Matrix &m, int64_t row, int64_t end, const Activations &a, float *y, int64_t y_stride,
                         bool add) {
    static thread_local std::vector<uint32_t> room;
    static thread_local std::vector<float> product;
    product.assign(WHOLE_ROWS * a.width, 0);
    auto weights = (const uint32_t *)unpacked<FORMAT, T>(m, row, end - row, WHOLE_ROWS, room);
    const int64_t K = m.in / PER_WORD<T>, bytes = WHOLE_ROWS * m.in * BITS<FORMAT> / 8;
    // Tiles take no time beside memory. In registers a row is multiplied in stretches, so that rows to come arrive then.
    const int64_t stretch = tiles::allowed() ? K : 32, ahead = tiles::allowed() ? 1 : 2;
    auto next = (const char *)m.data + (row + ahead * WHOLE_ROWS) * m.in * BITS<FORMAT> / 8;
    for (int64_t k = 0; k < K; k += stretch) {
        int64_t words = std::min(stretch, K - k);
        prefetch(next + bytes * k / K, bytes * words / K);
        multiply<T, true>(weights + k, K, (const uint32_t *)a.x + k * a.width, a.width, product.data(), a.width,
                          WHOLE_ROWS, a.width, words);
    }
    for (int64_t b = 0; b < a.count; b++)
        for (int64_t o = 0; o < end - row; o++) store(m, row + o, product[o * a.width + b], y + b * y_stride, add);
}

template <int64_t FORMAT>
void some_rows(const Matrix &m, int64_t row, const Activations &a, float *y, int64_t y_stride, bool add) {
    int64_t end = std::min(m.out, row + rows_together(a));
    if (a.width > 1) {
        if (a.in_bf16) several_activations<FORMAT, BF16>(m, row, end, a, y, y_stride, add);
        else several_activations<FORMAT, float>(m, row, end, a, y, y_stride, add);
    } else if (end - row == TOGETHER) one_activation<FORMAT, TOGETHER>(m, row, (const float *)a.x, y, add);
    else
        for (; row < end; row++) one_activation<FORMAT, 1>(m, row, (const float *)a.x, y, add);
}

// x (count, in), rows `stride` apart, laid out for weights of a format. The result holds until the next call.
template <class T>
Activations lay_out(const float *x, int64_t stride, int64_t count, int64_t in, int64_t format) {
    static thread_local std::vector<uint32_t> words, row;
    static thread_local std::vector<float> ordered;
    constexpr bool in_bf16 = PER_WORD<T> == 2;
    int64_t width = count == 1 && !in_bf16                            ? 1
                    : count > LANES || (in_bf16 && tiles::allowed()) ? SUM_COLUMNS
                                                                     : LANES;
    if (width == 1 && format != IN_FOURBIT) return {count, width, in_bf16, x};
    words.assign(in / PER_WORD<T> * width, 0);
    row.resize(in);
    ordered.resize(in);
    for (int64_t b = 0; b < count; b++) {
        const float *from = x + b * stride;
        for (int64_t k = 0; k < in; k++) ordered[k] = from[format == IN_FOURBIT ? fourbit_place(k) : k];
        for (int64_t k = 0; k < in; k += LANES) store((T *)row.data() + k, load(&ordered[k], in - k), in - k);
        for (int64_t k = 0; k < in / PER_WORD<T>; k++) words[k * width + b] = row[k];
    }
    return {count, width, in_bf16, words.data()};
}

}  // namespace

extern "C" {

// y (count, sum of out) = x (count, in) times each weight, transposed, side by side; with `add` on top of what y holds.
// in_bf16: multiply in bf16, if that is possible: not by fp32 weights.
void linear(const Matrix *matrices, int64_t matrix_count, const float *x, int64_t x_stride, float *y, int64_t y_stride,
            int64_t count, int64_t add, int64_t in_bf16, int64_t threads) {
    for (; count > SUM_COLUMNS; count -= SUM_COLUMNS, x += SUM_COLUMNS * x_stride, y += SUM_COLUMNS * y_stride)
        linear(matrices, matrix_count, x, x_stride, y, y_stride, SUM_COLUMNS, add, in_bf16, threads);
    int64_t in = matrices[0].in, format = matrices[0].format, work = 0;
    auto laid_out = in_bf16 && in % 2 == 0 && format != IN_FP32 ? lay_out<BF16> : lay_out<float>;
    const Activations a = laid_out(x, x_stride, count, in, format);
    auto some = format == IN_FP32   ? some_rows<IN_FP32>
                : format == IN_BF16 ? some_rows<IN_BF16>
                : format == IN_INT8 ? some_rows<IN_INT8>
                                    : some_rows<IN_FOURBIT>;
    for (int64_t i = 0; i < matrix_count; i++) work += matrices[i].out * in * count;
#pragma omp parallel num_threads(threads) if (work > WORTH_THREADS)
    {
        tiles::InUse unit;
        float *target = y;
        for (int64_t i = 0; i < matrix_count; i++) {
#pragma omp for schedule(static) nowait
            for (int64_t row = 0; row < matrices[i].out; row += rows_together(a))
                some(matrices[i], row, a, target, y_stride, add);
            target += matrices[i].out;
        }
    }
}

}

// A norm over each of `groups` stretches of `size` numbers in a row. decode.py has the same fields in this order.
struct Norm {
    int64_t groups, size;
    int64_t centered;          // whether their mean is taken away first: LayerNorm
    const float *gain, *bias;  // (size,) or null; gain (groups, size) if `each` has its own
    int64_t each;
    double eps;
};

namespace {

// y (size,) = the norm of x (size,), which may be the same place.
void norm_one(const Norm &norm, const float *gain, const float *x, float *y) {
    Floats sums = {}, squares = {};
    for (int64_t i = 0; i < norm.size && norm.centered; i += LANES) sums += load(x + i, norm.size - i);
    float mean = sum(sums) / norm.size;
    for (int64_t i = 0; i < norm.size; i += LANES) {
        Floats value = load(x + i, norm.size - i, mean) - mean;
        squares += value * value;
    }
    float scale = 1 / std::sqrt(sum(squares) / norm.size + (float)norm.eps);
    for (int64_t i = 0; i < norm.size; i += LANES) {
        int64_t left = norm.size - i;
        Floats value = (load(x + i, left) - mean) * scale;
        if (gain) value *= load(gain + i, left);
        if (norm.bias) value += load(norm.bias + i, left);
        store(y + i, value, left);
    }
}

enum Activation : int64_t { SILU, GELU, GELU_TANH, RELU, RELU_SQUARED };

inline Floats activation(int64_t kind, Floats x) {
    if (kind == SILU) return x * sigmoid(x);
    if (kind == GELU) return x * normal(x).below;
    if (kind == GELU_TANH) {
        constexpr float ROOT_2_BY_PI = M_SQRT1_2 * M_2_SQRTPI;
        return 0.5f * x * (1.0f + tanh(ROOT_2_BY_PI * (x + 0.044715f * x * x * x)));
    }
    Floats positive = x < 0.0f ? Floats{} : x;
    return kind == RELU ? positive : positive * positive;
}

}  // namespace

extern "C" {

// y (count, groups * size) = the norm of x, whose rows are x_stride apart. Both may be the same place.
void norm(const Norm *norm, const float *x, int64_t x_stride, float *y, int64_t y_stride, int64_t count) {
    for (int64_t n = 0; n < count; n++)
        for (int64_t g = 0; g < norm->groups; g++) {
            int64_t at = g * norm->size;
            norm_one(*norm, norm->gain + (norm->each ? at : 0), x + n * x_stride + at, y + n * y_stride + at);
        }
}

// y (count, inner) = act(gate) * up, for x (count, 2 inner) that holds gate and up side by side; if the MLP is not
// gated act(x), for x (count, inner).
void activate(const float *x, float *y, int64_t count, int64_t inner, int64_t kind, int64_t gated, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (count * inner > WORTH_THREADS / 8)
    for (int64_t n = 0; n < count; n++) {
        const float *first = x + n * (1 + gated) * inner, *up = first + inner;
        for (int64_t i = 0; i < inner; i += LANES) {
            Floats value = activation(kind, load(first + i, inner - i));
            if (gated) value *= load(up + i, inner - i);
            store(y + n * inner + i, value, inner - i);
        }
    }
}
}

// What attention needs to know of a layer. decode.py has the same fields in this order.
struct Layer {
    int64_t dims;                          // of each head, the first ones, that RoPE turns
    int64_t interleaved;                   // whether its pairs are (2i, 2i + 1), not (i, i + dims/2)
    const float *cos, *sin, *query_gain;   // of every position: (room, dims/2) twice, and (room,) or null
    int64_t window;                        // how many positions a query sees; 0 for all
    double scale, softcap;                 // as in ops/attention.py; softcap 0 for none
    const float *slopes, *sinks;           // (heads,) or null
};

namespace {

// Turn a head (d,) to its position. Pairs come out as (i, i + dims/2), as model.py puts them in its cache.
void rotate(const Layer &layer, float *head, int64_t position) {
    static thread_local std::vector<float> pairs;
    int64_t half = layer.dims / 2;
    const float *cos = layer.cos + position * half, *sin = layer.sin + position * half;
    if (layer.interleaved) {
        pairs.assign(head, head + 2 * half);
        for (int64_t i = 0; i < half; i++) head[i] = pairs[2 * i], head[i + half] = pairs[2 * i + 1];
    }
    for (int64_t i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cos[i] - second * sin[i];
        head[i + half] = second * cos[i] + first * sin[i];
    }
}

// scores (n,), with room for whole vectors, of a query head for the n positions up to its own: soft cap and ALiBi.
void change_scores(const Layer &layer, int64_t head, float *scores, int64_t n) {
    const float cap = layer.softcap;
    for (int64_t s = 0; cap && s < n; s += LANES) store(scores + s, cap * tanh(load(scores + s) / cap));
    if (layer.slopes)
        for (int64_t s = 0; s < n; s++) scores[s] -= layer.slopes[head] * (n - 1 - s);
}

// weights (n,), with room for whole vectors, become their softmax. sink: one more, which is not kept, or null.
void softmax(float *weights, int64_t n, const float *sink) {
    Floats tops = Floats{} - INFINITY, totals = {};
    for (int64_t s = n; s < round_up(n, LANES); s++) weights[s] = -INFINITY;
    for (int64_t s = 0; s < n; s += LANES) tops = larger(tops, load(weights + s));
    float top = sink ? std::max(largest(tops), *sink) : largest(tops);
    for (int64_t s = 0; s < n; s += LANES) {
        Floats weight = exp_negative(load(weights + s) - top);
        totals += weight;
        store(weights + s, weight);
    }
    float scale = 1 / (sum(totals) + (sink ? std::exp(*sink - top) : 0));
    for (int64_t s = 0; s < n; s += LANES) store(weights + s, load(weights + s) * scale);
}

// y (G, d) = softmax(scores of q k^T) v for the G query heads, from `head` on, that share a head's k and v (n, d).
// WHOLE: whether d is a multiple of LANES, which saves asking each time.
template <bool WHOLE, class T>
void attend_heads(const Layer &layer, int64_t head, int64_t G, float scale, const float *q, const T *k, const T *v,
                  int64_t n, int64_t d, float *y) {
    static thread_local std::vector<float> weights;
    int64_t room = round_up(n, LANES);
    weights.resize(G * room);
    for (int64_t s = 0; s < n; s++)
        for (int64_t g = 0; g < G; g++) {
            Floats products = {};
            for (int64_t i = 0; i < d; i += LANES) {
                int64_t left = WHOLE ? LANES : d - i;
                products += load(q + g * d + i, left) * load(k + s * d + i, left);
            }
            weights[g * room + s] = sum(products) * scale;
        }
    for (int64_t g = 0; g < G; g++) {
        change_scores(layer, head + g, &weights[g * room], n);
        softmax(&weights[g * room], n, layer.sinks ? layer.sinks + head + g : nullptr);
    }
    std::fill(y, y + G * d, 0.0f);
    for (int64_t s = 0; s < n; s++)
        for (int64_t g = 0; g < G; g++)
            for (int64_t i = 0; i < d; i += LANES) {
                int64_t left = WHOLE ? LANES : d - i;
                Floats value = load(v + s * d + i, left) * weights[g * room + s];
                store(y + g * d + i, load(y + g * d + i, left) + value, left);
            }
}

}  // namespace

// What attention needs to know of a model and a cache. decode.py has the same fields in this order.
struct Attention {
    int64_t in_bf16;                           // whether the cache is, else it is in fp32
    int64_t batch, heads, key_heads, d, room;  // room: positions that the cache can hold
    int64_t position;                          // the place of the new position in it
    float *qkv;                                // (batch, (heads + 2 key_heads) d): q, k, v of the new position
    const int64_t *padding;                    // (batch,): positions at the left of each row that hold nothing
    float *y;                                  // (batch, heads d)
    int64_t threads;
};

namespace {

template <class T>
void put(T *cache, const float *head, int64_t d) {
    for (int64_t i = 0; i < d; i += LANES) store(cache + i, load(head + i, d - i), d - i);
}

template <class T>
void attend_in(const Attention *a, const Layer &layer, T *k_cache, T *v_cache) {
    int64_t place = a->position, d = a->d, H = a->heads, K = a->key_heads, G = H / K, width = (H + 2 * K) * d;
    int64_t work = a->batch * H * place * d;
#pragma omp parallel for num_threads(a->threads) if (work > WORTH_THREADS)
    for (int64_t n = 0; n < a->batch * K; n++) {
        int64_t b = n / K, h = n % K, position = place - a->padding[b];
        float *row = a->qkv + b * width, *q = row + h * G * d, *k = row + (H + h) * d;
        T *keys = k_cache + n * a->room * d, *values = v_cache + n * a->room * d;
        for (int64_t g = 0; g < G; g++) rotate(layer, q + g * d, position);
        rotate(layer, k, position);
        put(keys + place * d, k, d);
        put(values + place * d, k + K * d, d);
        int64_t begin = std::max(a->padding[b], layer.window ? place + 1 - layer.window : 0);
        float scale = layer.scale * (layer.query_gain ? layer.query_gain[position] : 1);
        auto attend = d % LANES == 0 ? attend_heads<true, T> : attend_heads<false, T>;
        attend(layer, h * G, G, scale, q, keys + begin * d, values + begin * d, place + 1 - begin, d,
               a->y + (b * H + h * G) * d);
    }
}

}  // namespace

extern "C" {

// One new position of one layer: rotate its q and k, put k and v in the cache (batch, key_heads, room, d), attend.
void attend(const Attention *a, const Layer *layer, void *k_cache, void *v_cache) {
    if (a->in_bf16) attend_in(a, *layer, (BF16 *)k_cache, (BF16 *)v_cache);
    else attend_in(a, *layer, (float *)k_cache, (float *)v_cache);
}
}
