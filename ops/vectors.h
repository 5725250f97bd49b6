// Vectors of fp32, bf16 beside them, and products of small matrices: what kernels_cpu.cpp and decode_cpu.cpp share.
//
// Vector types are GCC's, so the same lines become AVX2, AVX-512 or NEON; where there is an instruction that GCC does
// not find, it is named.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "matrix_tiles.h"

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, SUM_ROWS = 8;
#else
constexpr int64_t LANES = 8, SUM_ROWS = 4;
#endif
constexpr int64_t SUM_COLUMNS = 2 * LANES;  // SUM_ROWS x SUM_COLUMNS sums stay in registers
#ifdef __AMX_BF16__
constexpr int64_t WHOLE_ROWS = 2 * tiles::SIZE;  // a product's rows are a multiple of it
#else
constexpr int64_t WHOLE_ROWS = SUM_ROWS;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));

struct BF16 {
    uint16_t bits;  // the upper half of an fp32
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ------------------------------------------------------------------------------------------------- reading and writing

Words to_words(Shorts x) {
#ifdef __AVX512F__
    return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined __AVX2__
    return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, Words);
#endif
}

Floats widen(Shorts bits) { return (Floats)(to_words(bits) << 16); }

Shorts narrow(Floats x) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
    return (Shorts)_mm512_cvtneps_pbh((__m512)x);
#endif
    Words bits = (Words)x;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 64, Shorts);  // a NaN stays one
}

template <class V>
V read(const void *address) {
    V value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

template <class V>
void write(void *address, V value) {
    std::memcpy(address, &value, sizeof value);
}

Floats load(const float *x) { return read<Floats>(x); }
Floats load(const BF16 *x) { return widen(read<Shorts>(x)); }
void store(float *x, Floats value) { write(x, value); }
void store(BF16 *x, Floats value) { write(x, narrow(value)); }

// LANES numbers, or the `count` that are left of a row: then the others are `rest`.
template <class T>
Floats load(const T *x, int64_t count, float rest = 0) {
    if (count >= LANES) return load(x);
    T some[LANES] = {};
    std::memcpy(some, x, count * sizeof(T));
    Floats value = load(some);
    for (int64_t i = count; i < LANES; i++) value[i] = rest;
    return value;
}

template <class T>
void store(T *x, Floats value, int64_t count) {
    if (count >= LANES) return store(x, value);
    T some[LANES];
    store(some, value);
    std::memcpy(x, some, count * sizeof(T));
}

Ints lane_numbers() {
    Ints numbers;
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return numbers;
}

float sum(Floats v) {
    for (int half = LANES / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lane_numbers() ^ half);
    return v[0];
}

float largest(Floats v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most || v[i] != v[i] ? v[i] : most;
    return most;
}

Floats larger(Floats a, Floats b) { return b > a || b != b ? b : a; }  // NaN, if there is one

// -------------------------------------------------------------------------------------------------------- activations

// exp(x) for x <= 0: 2^n times the Taylor series of the rest, which is at most ln(2) / 2 away from 0 (error 1e-7).
Floats exp_negative(Floats all) {
    Floats x = all < -87.0f ? Floats{} - 87.0f : all;  // below it the result is 0: nearly the smallest fp32
    Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
    Floats r = x - __builtin_convertvector(n, Floats) * 0.693147181f, y = 1.0f + r * (1.0f / 7);
    y = 1.0f + y * r * (1.0f / 6);
    y = 1.0f + y * r * (1.0f / 5);
    y = 1.0f + y * r * (1.0f / 4);
    y = 1.0f + y * r * (1.0f / 3);
    y = 1.0f + y * r * (1.0f / 2);
    y = 1.0f + y * r;
    return all < -87.0f ? Floats{} : y * (Floats)((n + 127) << 23);
}

Floats sigmoid(Floats x) {
    Floats e = exp_negative(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : Floats{} + 1.0f) / (1.0f + e);
}

// tanh(x), with one division: from exp(-2|x|), and near 0, where that loses digits, from Lambert's continued fraction.
Floats tanh(Floats x) {
    Floats size = x < 0.0f ? -x : x, e = exp_negative(size * -2.0f), z = x * x;
    Floats above = x < 0.0f ? e - 1.0f : 1.0f - e, near = x * (945.0f + z * (105.0f + z));
    return (size < 0.6f ? near : above) / (size < 0.6f ? 945.0f + z * (420.0f + z * 15.0f) : 1.0f + e);
}

// The normal distribution at x: its density, and the share below x, which is (1 + erf(x / sqrt(2))) / 2.
struct Normal {
    Floats density, below;
};

// The share beyond |x| is the density times a function that a polynomial of t = 1 / (1 + 0.3 |x|) is fitted to, with
// the least relative error (4e-7).
Normal normal(Floats x) {
    Floats size = x < 0.0f ? -x : x, e = exp_negative(x * x * -0.5f), t = 1.0f / (1.0f + size * 0.3f);
    constexpr float FITTED[] = {0.119629316f, 0.120753706f,  0.0999150500f, 0.128556475f,
                                -0.0536738224f, 0.206342712f, -0.157196715f, 0.0356732160f};
    Floats series = {};
    for (int i = 7; i >= 0; i--) series = (series + FITTED[i]) * t;
    Floats beyond = series * e;
    return {e * 0.398942280f, x < 0.0f ? beyond : 1.0f - beyond};
}

// ------------------------------------------------------------------------------------------------ products of matrices

// Products of matrices whose elements are in 32-bit words: a word holds one fp32, or two bf16 that are neighbours along
// the dimension that is summed over.

template <class T>
constexpr int64_t PER_WORD = 4 / sizeof(T);

template <class T>
Floats multiply_add(Floats sums, Words a, Words b);

template <>
inline Floats multiply_add<float>(Floats sums, Words a, Words b) {
    return sums + (Floats)a * (Floats)b;
}

template <>
inline Floats multiply_add<BF16>(Floats sums, Words a, Words b) {
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += (Floats)(a << 16) * (Floats)(b << 16);
    return sums + (Floats)(a & 0xffff0000) * (Floats)(b & 0xffff0000);
#endif
}

// c (M, N) = a (M, K words) b (K, N words), or with ADD on top of c. N is a multiple of V vectors.
template <class T, bool ADD, int V>
void multiply_in_registers(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, float *c,
                           int64_t c_stride, int64_t M, int64_t N, int64_t K) {
    for (int64_t n = 0; n < N; n += V * LANES)
        for (int64_t m = 0; m < M; m += SUM_ROWS) {
            const uint32_t *rows = a + m * a_stride, *columns = b + n;
            float *to = c + m * c_stride + n;
            Floats sums[SUM_ROWS][V] = {};
            if (ADD)
                for (int r = 0; r < SUM_ROWS; r++)
                    for (int v = 0; v < V; v++) sums[r][v] = load(to + r * c_stride + v * LANES);
            for (int64_t k = 0; k < K; k++, columns += b_stride) {
                Words some[V];
                for (int v = 0; v < V; v++) some[v] = read<Words>(columns + v * LANES);
                for (int r = 0; r < SUM_ROWS; r++) {
                    Words one = Words{} + rows[r * a_stride + k];
                    for (int v = 0; v < V; v++) sums[r][v] = multiply_add<T>(sums[r][v], one, some[v]);
                }
            }
            for (int r = 0; r < SUM_ROWS; r++)
                for (int v = 0; v < V; v++) store(to + r * c_stride + v * LANES, sums[r][v]);
        }
}

// The same by the fastest unit there is. Rows are a_stride, b_stride, c_stride apart. M is a multiple of WHOLE_ROWS, N
// of LANES, better of SUM_COLUMNS.
template <class T, bool ADD = false>
void multiply(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, float *c, int64_t c_stride,
              int64_t M, int64_t N, int64_t K) {
    bool in_tiles = PER_WORD<T> == 2 && tiles::allowed() && N % (2 * tiles::SIZE) == 0 && K % tiles::SIZE == 0;
    auto fastest = in_tiles               ? tiles::multiply<ADD>
                   : N % SUM_COLUMNS == 0 ? multiply_in_registers<T, ADD, 2>
                                          : multiply_in_registers<T, ADD, 1>;
    fastest(a, a_stride, b, b_stride, c, c_stride, M, N, K);
}

}  // namespace
