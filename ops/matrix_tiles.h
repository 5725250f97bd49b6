// Products of bf16 matrices in Intel's AMX, a unit beside the vector registers that holds tiles of 16 x 16 words.
//
// For kernels_cpu.cpp and decode_cpu.cpp, which have a way without it. A word holds two bf16 that are neighbours along
// the dimension that is summed over. Reference: Intel's 64 and IA-32 Architectures Software Developer's Manual, AMX.

#pragma once

#include <cstdint>

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tiles {

constexpr int64_t SIZE = 16;  // rows of a tile, and words in each

#ifdef __AMX_BF16__

// Whether this process may use them: Linux gives a thread room for eight tiles of 1 KiB only when it is asked.
inline bool allowed() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool answer = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return answer;
}

// While it lives its thread's eight tiles are of SIZE rows and words.
struct InUse {
    InUse() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes_in_row[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int tile = 0; tile < 8; tile++) shapes.bytes_in_row[tile] = 4 * SIZE, shapes.rows[tile] = SIZE;
        if (allowed()) _tile_loadconfig(&shapes);
    }
    ~InUse() {
        if (allowed()) _tile_release();
    }
};

// c (M, N) fp32 = a (M, K words) b (K words, N), or with ADD on top of c; M and N are multiples of 2 SIZE, K of SIZE.
// Rows are `stride` words apart.
template <bool ADD>
void multiply(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, float *c, int64_t c_stride,
              int64_t M, int64_t N, int64_t K) {
    for (int64_t n = 0; n < N; n += 2 * SIZE)
        for (int64_t m = 0; m < M; m += 2 * SIZE) {
            float *upper = c + m * c_stride + n, *lower = upper + SIZE * c_stride;
            if (ADD) {
                _tile_loadd(0, upper, 4 * c_stride);
                _tile_loadd(1, upper + SIZE, 4 * c_stride);
                _tile_loadd(2, lower, 4 * c_stride);
                _tile_loadd(3, lower + SIZE, 4 * c_stride);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t k = 0; k < K; k += SIZE) {
                _tile_loadd(4, a + m * a_stride + k, 4 * a_stride);
                _tile_loadd(5, a + (m + SIZE) * a_stride + k, 4 * a_stride);
                _tile_loadd(6, b + k * b_stride + n, 4 * b_stride);
                _tile_loadd(7, b + k * b_stride + n + SIZE, 4 * b_stride);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, upper, 4 * c_stride);
            _tile_stored(1, upper + SIZE, 4 * c_stride);
            _tile_stored(2, lower, 4 * c_stride);
            _tile_stored(3, lower + SIZE, 4 * c_stride);
        }
}

#else

constexpr bool allowed() { return false; }

struct InUse {
    InUse() {}  // so that no compiler says that it is unused
};

template <bool ADD>
void multiply(const uint32_t *, int64_t, const uint32_t *, int64_t, float *, int64_t, int64_t, int64_t, int64_t) {}

#endif

}  // namespace tiles
