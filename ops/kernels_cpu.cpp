// What norm.py, activation.py, rotation.py, loss.py, attention.py and low_rank.py compute on a CPU, in fp32 or bf16,
// with all arithmetic in fp32.
//
// cpp.py compiles this file once with g++ and calls it through ctypes; the plain references are in those files. Each
// row, head, sample or strip of a sum is one thread's work, from the first number to the last: results do not depend on
// which thread takes it.

#include "vectors.h"

namespace {

// ------------------------------------------------------------------------------------------ norm, activation, rotation

// y = (x - mean) / deviation * gain + shift for each of `rows` rows: LayerNorm. means and inverses (rows,) receive the
// mean and 1 / deviation. If not CENTRED, RMSNorm: no mean is taken off and no shift added.
template <class T, bool CENTRED>
void norm_rows(const T *x, const float *gain, const float *shift, float eps, T *y, float *means, float *inverses,
               int64_t rows, int64_t size, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const T *from = x + row * size;
        float mean = 0;
        if constexpr (CENTRED) {
            Floats total = {};
            for (int64_t i = 0; i < size; i += LANES) total += load(from + i, size - i);
            mean = means[row] = sum(total) / size;
        }
        Floats squares = {};
        for (int64_t i = 0; i < size; i += LANES) {
            Floats value = load(from + i, size - i, mean) - mean;
            squares += value * value;
        }
        float scale = inverses[row] = 1 / std::sqrt(sum(squares) / size + eps);
        for (int64_t i = 0; i < size; i += LANES) {
            Floats value = (load(from + i, size - i) - mean) * scale * load(gain + i, size - i);
            if constexpr (CENTRED) value += load(shift + i, size - i);
            store(y + row * size + i, value, size - i);
        }
    }
}

void add_to(float *sums, Floats value, int64_t count) { store(sums, load(sums, count) + value, count); }

// grad_x, and into gain_sums and shift_sums (threads, size), where not null, each thread's part of their gradients.
template <class T, bool CENTRED>
void norm_rows_backward(const T *grad, const T *x, const float *gain, const float *means, const float *inverses,
                        T *grad_x, float *gain_sums, float *shift_sums, int64_t rows, int64_t size, int64_t threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t part = 0; part < threads; part++)
        for (int64_t row = rows * part / threads; row < rows * (part + 1) / threads; row++) {
            const T *g = grad + row * size, *from = x + row * size;
            float scale = inverses[row], mean = CENTRED ? means[row] : 0;
            Floats products = {}, total = {};
            for (int64_t i = 0; i < size; i += LANES) {
                Floats straight = load(g + i, size - i) * load(gain + i, size - i);
                products += straight * (load(from + i, size - i) - mean);
                if constexpr (CENTRED) total += straight;
            }
            float along = sum(products) * scale * scale / size, shared = CENTRED ? sum(total) / size : 0;
            for (int64_t i = 0; i < size; i += LANES) {
                Floats value = load(from + i, size - i) - mean, gradient = load(g + i, size - i);
                Floats straight = gradient * load(gain + i, size - i) - shared;
                store(grad_x + row * size + i, (straight - value * along) * scale, size - i);
                if (gain_sums) add_to(gain_sums + part * size + i, gradient * value * scale, size - i);
                if (CENTRED && shift_sums) add_to(shift_sums + part * size + i, gradient, size - i);
            }
        }
}

constexpr int64_t STRETCH = 4096;  // numbers that a thread takes at a time where each is by itself

// An activation and its derivative at x.
struct Point {
    Floats value, slope;
};

struct SiLU {
    static Point at(Floats x) {
        Floats s = sigmoid(x);
        return {x * s, s * (1.0f + x * (1.0f - s))};
    }
};

struct GELU {
    static Point at(Floats x) {
        Normal n = normal(x);
        return {x * n.below, n.below + x * n.density};
    }
};

struct TanhGELU {  // (1 + tanh(u)) / 2 is the sigmoid of 2 u
    static Point at(Floats x) {
        Floats near = x > 10.0f ? Floats{} + 10.0f : x < -10.0f ? Floats{} - 10.0f : x;  // further out s is 0 or 1
        constexpr float LINEAR = 1.59576912f, CUBIC = 0.044715f * LINEAR;  // 2 u = LINEAR x + CUBIC x^3: 2 sqrt(2 / pi)
        Floats z = near * near, s = sigmoid(near * (LINEAR + z * CUBIC));
        return {x * s, s + near * s * (1.0f - s) * (LINEAR + z * (3 * CUBIC))};
    }
};

struct ReLU {
    static Point at(Floats x) { return {x < 0.0f ? Floats{} : x, x <= 0.0f ? Floats{} : Floats{} + 1.0f}; }
};

struct ReLU2 {
    static Point at(Floats x) {
        Floats positive = x < 0.0f ? Floats{} : x;
        return {positive * positive, 2.0f * positive};
    }
};

// y = A(x), or, GATED, A(x) * up.
template <class A, bool GATED, class T>
void activate_all(const T *x, const T *up, T *y, int64_t count, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < count; start += STRETCH)
        for (int64_t i = start; i < std::min(count, start + STRETCH); i += LANES) {
            Floats value = A::at(load(x + i, count - i)).value;
            if constexpr (GATED) value *= load(up + i, count - i);
            store(y + i, value, count - i);
        }
}

template <class A, bool GATED, class T>
void activate_all_backward(const T *grad, const T *x, const T *up, T *grad_x, T *grad_up, int64_t count,
                           int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < count; start += STRETCH)
        for (int64_t i = start; i < std::min(count, start + STRETCH); i += LANES) {
            Point point = A::at(load(x + i, count - i));
            Floats gradient = load(grad + i, count - i);
            if constexpr (GATED) {
                Floats factor = load(up + i, count - i);  // grad_up may have its memory
                store(grad_up + i, gradient * point.value, count - i);
                gradient *= factor;
            }
            store(grad_x + i, gradient * point.slope, count - i);
        }
}

// MurmurHash3's last step.
inline uint32_t mixed(uint32_t h) {
    h = (h ^ h >> 16) * 0x85EBCA6B;
    h = (h ^ h >> 13) * 0xC2B2AE35;
    return h ^ h >> 16;
}

// y = x * factor where the hash of an element's number is at least the threshold, else 0.
template <class T>
void drop(const T *x, T *y, int64_t count, float factor, uint32_t threshold, uint32_t seed, uint32_t other_seed,
          int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < count; start += STRETCH) {
        float factors[STRETCH];
        for (int64_t i = 0; i < STRETCH; i++)
            factors[i] = mixed(mixed((uint32_t)(start + i) ^ seed) ^ other_seed) >= threshold ? factor : 0.0f;
        for (int64_t i = start; i < std::min(count, start + STRETCH); i += LANES) {
            Floats value = load(x + i, count - i) * load(factors + i - start, LANES);
            store(y + i, load(factors + i - start, LANES) == 0.0f ? Floats{} : value, count - i);
        }
    }
}

// y = x turned, for x (batch, positions, heads, d); cos, sin (batch or 1, positions, half). sign -1 turns back. What
// comes after the first 2 half dimensions is copied.
template <class T>
void rotate_all(const T *x, const float *cos, const float *sin, float sign, T *y, int64_t batch, int64_t positions,
                int64_t heads, int64_t d, int64_t half, bool same_in_batch, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t place = 0; place < batch * positions; place++) {
        int64_t angle = (same_in_batch ? place % positions : place) * half;
        for (int64_t h = 0; h < heads; h++) {
            const T *from = x + (place * heads + h) * d;
            T *to = y + (place * heads + h) * d;
            for (int64_t i = 0; i < half; i += LANES) {
                Floats c = load(cos + angle + i, half - i), s = load(sin + angle + i, half - i) * sign;
                Floats first = load(from + i, half - i), second = load(from + half + i, half - i);
                store(to + i, first * c - second * s, half - i);
                store(to + half + i, second * c + first * s, half - i);
            }
            if (d > 2 * half) std::memcpy(to + 2 * half, from + 2 * half, (d - 2 * half) * sizeof(T));
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ the loss

// The first `count` lanes of a vector; the others are 0.
Floats first_lanes(Floats x, int64_t count) { return lane_numbers() < (int32_t)count ? x : Floats{}; }

// losses (rows,) = -log softmax(logits)[target] and log_sums (rows,) = log sum exp(logits), NaN if there is no such
// logit; with `backward` the logits become the gradient of losses + z_loss * log_sums^2: (1 + 2 z_loss log_sum) softmax,
// less 1 at the target. If CAPPED, the softmax is of softcap * tanh(logits / softcap), which is computed again in each
// pass: in bf16 there is no room to keep it.
template <class T, bool CAPPED>
void loss_rows(T *logits, const int64_t *targets, float *losses, float *log_sums, int64_t rows, int64_t size,
               bool backward, float softcap, float z_loss, int64_t threads) {
    const float inverse = 1 / softcap;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        T *x = logits + row * size;
        int64_t target = targets[row];
        if (target < 0 || target >= size) {
            losses[row] = log_sums[row] = NAN;
            continue;
        }
        auto share = [&](Floats logit) { return CAPPED ? tanh(logit * inverse) : logit; };
        auto capped = [&](Floats share) { return CAPPED ? share * softcap : share; };
        Floats tops = Floats{} - INFINITY, sums = {};
        for (int64_t i = 0; i < size; i += LANES) tops = larger(tops, load(x + i, size - i, -INFINITY));
        float top = capped(share(Floats{} + largest(tops)))[0];  // the cap keeps the order
        for (int64_t i = 0; i < size; i += LANES) {
            Floats weight = exp_negative(capped(share(load(x + i, size - i, -INFINITY))) - top);
            sums += CAPPED && size - i < LANES ? first_lanes(weight, size - i) : weight;
        }
        float total = sum(sums);
        Floats aim = share(Floats{} + load(x + target, 1)[0]);
        log_sums[row] = std::log(total) + top;
        losses[row] = log_sums[row] - capped(aim)[0];
        if (!backward) continue;
        float factor = (1 + 2 * z_loss * log_sums[row]) / total;
        for (int64_t i = 0; i < size; i += LANES) {
            Floats t = share(load(x + i, size - i)), weight = exp_negative(capped(t) - top) * factor;
            store(x + i, CAPPED ? weight * (1.0f - t * t) : weight, size - i);
        }
        Floats slope = CAPPED ? 1.0f - aim * aim : Floats{} + 1.0f;
        store(x + target, load(x + target, 1) - slope, 1);
    }
}

// ---------------------------------------------------------------------------------------------------------- attention
//
// Everything is copied into words (vectors.h) and filled up with zeros to whole products first, which costs little: a
// head's q, k and v are small, their products are not.

constexpr int64_t QUERIES = 32;  // queries of a head that attend together

typedef std::vector<uint32_t> Buffer;

// x (count, d), whose rows are `stride` apart, as T (rows, width) with zeros around it: words along d.
template <class S, class T = S>
const uint32_t *along(Buffer &to, const S *x, int64_t stride, int64_t count, int64_t d, int64_t rows, int64_t width) {
    to.resize(rows * width / PER_WORD<T>);
    for (int64_t i = 0; i < rows; i++) {
        T *row = (T *)to.data() + i * width;
        int64_t filled = i < count ? d : 0;
        if constexpr (std::is_same_v<S, T>) std::memcpy(row, x + i * stride, filled * sizeof(T));
        else
            for (int64_t j = 0; j < filled; j += LANES) store(row + j, load(x + i * stride + j, filled - j), filled - j);
        std::memset(row + filled, 0, (width - filled) * sizeof(T));
    }
    return to.data();
}

// The same numbers with words along the rows: (rows / PER_WORD, width), from x (rows, width).
template <class T>
const uint32_t *down(Buffer &to, const T *x, int64_t rows, int64_t width) {
    if constexpr (PER_WORD<T> == 1) {
        to.assign((const uint32_t *)x, (const uint32_t *)x + rows * width);
    } else {
        to.resize(rows / 2 * width);
        for (int64_t i = 0; i < rows; i += 2)
            for (int64_t j = 0; j < width; j += LANES) {
                Words first = to_words(read<Shorts>(x + i * width + j));
                Words second = to_words(read<Shorts>(x + (i + 1) * width + j));
                write(&to[i / 2 * width + j], first | second << 16);
            }
    }
    return to.data();
}

// A step of turning LANES x LANES words: rows that are STEP apart exchange the lanes that are.
template <int STEP>
void exchange(Words (&rows)[LANES]) {
    Words left, right;  // lanes of the first row count from 0, those of the second from LANES
    for (int i = 0; i < LANES; i++) {
        left[i] = i & STEP ? LANES + i - STEP : i;
        right[i] = i & STEP ? LANES + i : i + STEP;
    }
    for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) {
            Words first = rows[i], second = rows[i + STEP];
            rows[i] = __builtin_shuffle(first, second, left);
            rows[i + STEP] = __builtin_shuffle(first, second, right);
        }
}

// Words (rows, columns), whole multiples of LANES, turned: (columns, rows).
const uint32_t *turned(Buffer &to, const uint32_t *x, int64_t rows, int64_t columns) {
    to.resize(rows * columns);
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < columns; j += LANES) {
            Words block[LANES];
            for (int64_t r = 0; r < LANES; r++) block[r] = read<Words>(x + (i + r) * columns + j);
            exchange<1>(block);
            exchange<2>(block);
            exchange<4>(block);
            if constexpr (LANES == 16) exchange<8>(block);
            for (int64_t r = 0; r < LANES; r++) write(&to[(j + r) * rows + i], block[r]);
        }
    return to.data();
}

}  // namespace

// What attention computes from: samples end to end in x (positions, heads, d). attention.py has the same fields.
struct Heads {
    int64_t heads, key_heads, d, window;  // window: positions back that a query sees, itself included; 0 for all
    int64_t samples;
    const int64_t *offsets;  // (samples + 1,): where each sample begins, and the last one ends
    const float *slopes;     // (heads,): how much a score falls for each position back (ALiBi); or null
    const float *sinks;      // (heads,): the score of one more key, which has no value; or null
    float scale, softcap;    // softcap: 0 for none

    bool bends() const { return softcap || slopes; }  // whether scores are more than scaled products
};

namespace {

struct Workspace {
    Buffer rows, k_along, v_along, k_across, v_down, k_turned, q_across, q_down, y_across, y_down;
    Buffer weights, grads, pairs;
    std::vector<float> scores, through, result, grad_k, grad_v, factors;
};

// Products of queries with keys that lie `back` positions back become the scores of one head, where these are more than
// scaled products. Where `factors` is not null it receives their derivatives. by: `back` from one lane to the next.
void bend(float *products, float *factors, int64_t count, int64_t back, int64_t by, const Heads &a, int64_t head) {
    Floats places = __builtin_convertvector(lane_numbers() * (int32_t)by, Floats);
    float slope = a.slopes ? a.slopes[head] : 0, inverse = 1 / a.softcap;
    for (int64_t n = 0; n < count; n += LANES) {
        Floats score = load(products + n) * a.scale, factor = Floats{} + a.scale;
        if (a.softcap) {
            Floats share = tanh(score * inverse);
            score = share * a.softcap;
            factor *= 1.0f - share * share;
        }
        store(products + n, score - (places + (float)(back + n * by)) * slope);
        if (factors) store(factors + n, factor);
    }
}

// weights (N,) = exp(scale * score - the largest of them) from `low` to `high`, 0 elsewhere; their sum, and that of the
// sink, whose score is -infinity where there is none.
template <class T>
float softmax(const float *scores, T *weights, int64_t N, int64_t low, int64_t high, float scale, float sink,
              float *log_sum) {
    Floats tops = Floats{} - INFINITY, sums = {};
    int64_t first = low / LANES * LANES, end = high / LANES * LANES + LANES;
    auto seen = [&](int64_t n, Floats value, float otherwise) {
        if (n >= low && n + LANES <= high + 1) return value;
        Ints place = lane_numbers() + (int32_t)n;
        return (place >= (int32_t)low) & (place <= (int32_t)high) ? value : Floats{} + otherwise;
    };
    for (int64_t n = first; n < end; n += LANES) tops = larger(tops, seen(n, load(scores + n), -INFINITY));
    float top = std::max(largest(tops) * scale, sink);
    for (int64_t n = 0; n < first; n += LANES) store(weights + n, Floats{});
    for (int64_t n = first; n < end; n += LANES) {
        Floats weight = seen(n, exp_negative(load(scores + n) * scale - top), 0);
        sums += weight;
        store(weights + n, weight);
    }
    for (int64_t n = end; n < N; n += LANES) store(weights + n, Floats{});
    float total = sum(sums);
    if (sink > -INFINITY) total += std::exp(sink - top);
    *log_sum = top + std::log(total);
    return total;
}

// One head's softmax(q k^T) v over the keys that its sample has. log_sums (positions, heads) is kept for the backward.
template <class T>
void attend_sample(const Heads &a, int64_t sample, int64_t key_head, const T *q, const T *k, const T *v, T *y,
                   float *log_sums, Workspace &w) {
    int64_t start = a.offsets[sample], L = a.offsets[sample + 1] - start, d = a.d, width = round_up(d, SUM_COLUMNS);
    int64_t H = a.heads, K = a.key_heads, room = round_up(L, QUERIES), words = width / PER_WORD<T>;
    int64_t at = (start * K + key_head) * d;
    along(w.rows, k + at, K * d, L, d, room, width);
    const uint32_t *k_across = turned(w.k_across, w.rows.data(), room, words);
    along(w.v_along, v + at, K * d, L, d, room, width);
    const uint32_t *v_down = down(w.v_down, (const T *)w.v_along.data(), room, width);
    w.scores.resize(QUERIES * room);
    w.result.resize(QUERIES * width);
    w.weights.resize(QUERIES * room);
    for (int64_t h = key_head * (H / K); h < (key_head + 1) * (H / K); h++)
        for (int64_t first = 0; first < L; first += QUERIES) {
            int64_t count = std::min(QUERIES, L - first), M = round_up(count, WHOLE_ROWS);
            int64_t begin = a.window ? std::max<int64_t>(0, first - a.window + 1) / QUERIES * QUERIES : 0;
            int64_t N = round_up(first + count - begin, SUM_COLUMNS);
            const uint32_t *q_along = along(w.rows, q + ((start + first) * H + h) * d, H * d, count, d, M, width);
            multiply<T>(q_along, words, k_across + begin, room, w.scores.data(), N, M, N, words);
            float totals[QUERIES];
            for (int64_t i = 0; i < count; i++) {
                int64_t query = first + i, low = a.window ? std::max<int64_t>(0, query - a.window + 1) : 0;
                float *log_sum = log_sums + (start + query) * H + h, *scores = w.scores.data() + i * N;
                if (a.bends()) bend(scores, nullptr, N, query - begin, -1, a, h);
                totals[i] = softmax(scores, (T *)w.weights.data() + i * N, N, low - begin, query - begin,
                                    a.bends() ? 1 : a.scale, a.sinks ? a.sinks[h] : -INFINITY, log_sum);
            }
            multiply<T>(w.weights.data(), N / PER_WORD<T>, v_down + begin / PER_WORD<T> * width, width,
                        w.result.data(), width, M, width, N / PER_WORD<T>);
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < d; j += LANES)
                    store(y + ((start + first + i) * H + h) * d + j, load(&w.result[i * width + j]) / totals[i], d - j);
        }
}

// Weights and their gradients, (M, QUERIES) each, for M keys down and QUERIES queries across, where the first key comes
// `ahead` positions after the first query (below 0: before it). scores are used up. through: the gradient of the
// weights. all_dots (QUERIES,) receives that of each query's weights with their gradients. If BENT, scores are what
// `bend` made of products, with its factors (M, QUERIES).
template <class T, bool BENT>
void softmax_backward(float *scores, const float *factors, const float *through, const float *log_sums, int64_t M,
                      int64_t ahead, const Heads &a, float *all_dots, T *weights, T *grads) {
    constexpr int64_t V = QUERIES / LANES;
    const int64_t window = a.window ? a.window : INT32_MAX;
    const float scale = BENT ? 1 : a.scale;
    Floats dots[V] = {};
    for (int64_t m = 0; m < M; m++)
        for (int64_t v = 0; v < V; v++) {
            int64_t nearest = v * LANES - ahead - m;  // positions from the key to the first query
            float *score = scores + m * QUERIES + v * LANES;
            Floats weight = exp_negative(load(score) * scale - load(log_sums + v * LANES));
            if (nearest < 0 || nearest + LANES > window) {
                Ints back = lane_numbers() + (int32_t)nearest;
                weight = (back >= 0) & (back < (int32_t)window) ? weight : Floats{};
            }
            dots[v] += weight * load(through + m * QUERIES + v * LANES);
            store(score, weight);
            store(weights + m * QUERIES + v * LANES, weight);
        }
    for (int64_t m = 0; m < M; m++)
        for (int64_t v = 0; v < V; v++) {
            int64_t at = m * QUERIES + v * LANES;
            Floats gradient = load(scores + at) * (load(through + at) - dots[v]);
            store(grads + at, gradient * (BENT ? load(factors + at) : Floats{} + a.scale));
        }
    for (int64_t v = 0; v < V; v++) store(all_dots + v * LANES, dots[v]);
}

// The gradients of a key head's k and v in one sample, and of the q of all query heads that share it. The weights are
// computed again, turned: keys down, queries across, so that sums over queries and over keys need no other layout.
// grad_sinks (samples, heads), if there are sinks, is added to.
template <class T>
void attend_sample_backward(const Heads &a, int64_t sample, int64_t key_head, const T *grad, const T *q, const T *k,
                            const T *v, const float *log_sums, T *grad_q, T *grad_k, T *grad_v, float *grad_sinks,
                            Workspace &w) {
    int64_t start = a.offsets[sample], L = a.offsets[sample + 1] - start, d = a.d, width = round_up(d, SUM_COLUMNS);
    int64_t H = a.heads, K = a.key_heads, room = round_up(L, QUERIES), words = width / PER_WORD<T>;
    int64_t at = (start * K + key_head) * d, P = PER_WORD<T>;
    const uint32_t *k_along = along(w.k_along, k + at, K * d, L, d, room, width);
    const uint32_t *v_along = along(w.v_along, v + at, K * d, L, d, room, width);
    down(w.rows, (const T *)k_along, room, width);
    const uint32_t *k_turned = turned(w.k_turned, w.rows.data(), room / P, width);
    w.grad_k.assign(room * width, 0);
    w.grad_v.assign(room * width, 0);
    w.scores.resize(room * QUERIES);
    w.through.resize(room * QUERIES);
    if (a.bends()) w.factors.resize(room * QUERIES);
    w.result.resize(width * QUERIES);
    for (Buffer *buffer : {&w.weights, &w.grads}) buffer->resize(room * QUERIES / P);
    for (int64_t h = key_head * (H / K); h < (key_head + 1) * (H / K); h++)
        for (int64_t first = 0; first < L; first += QUERIES) {
            int64_t count = std::min(QUERIES, L - first), place = ((start + first) * H + h) * d;
            int64_t begin = a.window ? std::max<int64_t>(0, first - a.window + 1) / QUERIES * QUERIES : 0;
            int64_t M = round_up(first + count - begin, WHOLE_ROWS);
            along(w.rows, q + place, H * d, count, d, QUERIES, width);
            const uint32_t *q_across = turned(w.q_across, w.rows.data(), QUERIES, words);
            const uint32_t *q_down = down(w.q_down, (const T *)w.rows.data(), QUERIES, width);
            along(w.rows, grad + place, H * d, count, d, QUERIES, width);
            const uint32_t *y_across = turned(w.y_across, w.rows.data(), QUERIES, words);
            const uint32_t *y_down = down(w.y_down, (const T *)w.rows.data(), QUERIES, width);
            float *scores = w.scores.data(), *through = w.through.data();
            multiply<T>(k_along + begin * words, words, q_across, QUERIES, scores, QUERIES, M, QUERIES, words);
            multiply<T>(v_along + begin * words, words, y_across, QUERIES, through, QUERIES, M, QUERIES, words);
            float kept[QUERIES] = {}, dots[QUERIES];
            for (int64_t i = 0; i < count; i++) kept[i] = log_sums[(start + first + i) * H + h];
            if (a.bends())
                for (int64_t m = 0; m < M; m++)
                    bend(scores + m * QUERIES, &w.factors[m * QUERIES], QUERIES, first - begin - m, 1, a, h);
            auto backward = a.bends() ? softmax_backward<T, true> : softmax_backward<T, false>;
            backward(scores, w.factors.data(), through, kept, M, begin - first, a, dots, (T *)w.weights.data(),
                     (T *)w.grads.data());
            if (a.sinks)
                for (int64_t i = 0; i < count; i++)
                    grad_sinks[sample * H + h] -= std::exp(a.sinks[h] - kept[i]) * dots[i];
            const uint32_t *grads_down = down(w.pairs, (const T *)w.grads.data(), M, QUERIES);
            multiply<T, true>(w.weights.data(), QUERIES / P, y_down, width, &w.grad_v[begin * width], width, M, width,
                              QUERIES / P);
            multiply<T, true>(w.grads.data(), QUERIES / P, q_down, width, &w.grad_k[begin * width], width, M, width,
                              QUERIES / P);
            multiply<T>(k_turned + begin / P, room / P, grads_down, QUERIES, w.result.data(), QUERIES, width,
                        QUERIES, M / P);
            auto result = (const float *)turned(w.rows, (const uint32_t *)w.result.data(), width, QUERIES);
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < d; j += LANES)
                    store(grad_q + place + i * H * d + j, load(result + i * width + j), d - j);
        }
    for (int64_t i = 0; i < L; i++)
        for (int64_t j = 0; j < d; j += LANES) {
            store(grad_k + at + i * K * d + j, load(&w.grad_k[i * width + j]), d - j);
            store(grad_v + at + i * K * d + j, load(&w.grad_v[i * width + j]), d - j);
        }
}

template <class Work>
void each_sample_and_key_head(const Heads &a, int64_t threads, Work work) {
#pragma omp parallel num_threads(threads)
    {
        static thread_local Workspace workspace;
        tiles::InUse unit;
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < a.samples * a.key_heads; n++) work(n / a.key_heads, n % a.key_heads, workspace);
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------- low-rank adapters
//
// LoRA over layers of one input: y += scale * small B^T, where small = x A^T. Products as thin as these cost as much as
// reading what they multiply, so a block of positions goes through all of them while it is in the cache.

// Of one layer at the positions of a part.
struct Factors {
    const float *A, *B;      // (rank, in), (out, rank)
    float *grad_A, *grad_B;  // receive the gradients, in the backward pass
    int64_t rank;
    float scale;
};

// Positions with one adapter. small (end - start, ranks): x A^T of its layers side by side.
struct Part {
    int64_t start, end, ranks;
    void *small;
    const Factors *layers;
};

// Layers of one input. ys: what they give, or in the backward pass its gradient: (positions, out) each.
struct Layers {
    int64_t in, count, parts;
    const int64_t *outs;
    void *const *ys;
    const Part *all;
};

namespace {

constexpr int64_t MOST_ROWS = 64;                // positions that go through all products together
constexpr int64_t STRIP = 256, POSITIONS = 256;  // columns of a gradient that are one thread's, and how it sums them up

int64_t whole(int64_t n) { return round_up(n, SUM_COLUMNS); }

// Columns of all layers' ranks side by side, each filled up to whole vectors.
int64_t filled_columns(const Part &part, int64_t layers) {
    int64_t columns = 0;
    for (int64_t i = 0; i < layers; i++) columns += round_up(part.layers[i].rank, LANES);
    return columns;
}

// A part's A, of all layers, and B, of each, as words: in the forward pass of A^T and B^T.
struct Multiplied {
    Buffer A;
    std::vector<Buffer> B;
};

// What a thread writes to meanwhile.
struct Thin {
    Buffer rows, more, turned, along, small, strip;
    std::vector<float> sums;
};

template <class T>
void lay_out_A(const Part &part, int64_t layers, int64_t in, bool backward, Multiplied &to, Thin &w) {
    int64_t P = PER_WORD<T>, C = filled_columns(part, layers), width = whole(in), column = 0;
    w.more.resize(C * width / P);
    for (int64_t i = 0; i < layers; i++) {
        int64_t rank = part.layers[i].rank, rows = round_up(rank, LANES);
        along<float, T>(w.rows, part.layers[i].A, in, rank, in, rows, width);
        std::copy(w.rows.begin(), w.rows.end(), w.more.begin() + column * width / P);
        column += rows;
    }
    if (backward) down(to.A, (const T *)w.more.data(), C, width);
    else turned(to.A, w.more.data(), C, width / P);
}

template <class T>
void lay_out_B(const Factors &f, int64_t out, bool backward, Buffer &to, Thin &w) {
    int64_t width = backward ? round_up(f.rank, LANES) : whole(f.rank);
    along<float, T>(w.rows, f.B, f.rank, out, f.rank, whole(out), width);
    if (backward) down(to, (const T *)w.rows.data(), whole(out), width);
    else turned(to, w.rows.data(), whole(out), width / PER_WORD<T>);
}

// y (M, N) += scale * a (M, K words) b (K, N): by vectors, as K is small. a has rows up to a multiple of SUM_ROWS, b
// columns up to one of SUM_COLUMNS.
template <class T>
void add_product(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, T *y, int64_t M, int64_t N,
                 int64_t K, float scale) {
    for (int64_t m = 0; m < M; m += SUM_ROWS)
        for (int64_t n = 0; n < N; n += SUM_COLUMNS) {
            float sums[SUM_ROWS * SUM_COLUMNS];
            multiply_in_registers<T, false, 2>(a + m * a_stride, a_stride, b + n, b_stride, sums, SUM_COLUMNS, SUM_ROWS,
                                               SUM_COLUMNS, K);
            for (int64_t r = 0; r < SUM_ROWS && m + r < M; r++)
                for (int64_t j = n; j < std::min(N, n + SUM_COLUMNS); j += LANES) {
                    T *place = y + (m + r) * N + j;
                    store(place, load(place, N - j) + load(sums + r * SUM_COLUMNS + j - n) * scale, N - j);
                }
        }
}

// sums (M, columns) of layer i and those after it, `count` in all: as T into a part's `small`, whose columns are not
// filled up.
template <class T>
void keep_small(const Part &part, int64_t i, int64_t count, const float *sums, int64_t stride, int64_t M, T *small) {
    int64_t before = 0;
    for (int64_t j = 0; j < i; j++) before += part.layers[j].rank;
    for (int64_t end = i + count; i < end; i++) {
        int64_t rank = part.layers[i].rank;
        for (int64_t m = 0; m < M; m++)
            for (int64_t r = 0; r < rank; r += LANES)
                store(small + m * part.ranks + before + r, load(sums + m * stride + r), rank - r);
        before += rank;
        sums += round_up(rank, LANES);
    }
}

// sums (rows, columns) as T from a column of `to` on, whose rows are `stride` long: for the next product.
template <class T>
void fill(Buffer &to, const float *sums, int64_t rows, int64_t stride, int64_t columns, int64_t column) {
    for (int64_t m = 0; m < rows; m++)
        for (int64_t r = 0; r < columns; r += LANES)
            store((T *)to.data() + m * stride + column + r, load(sums + m * columns + r));
}

// Positions `first` to `last` of a part, forward: small, and what it adds to all ys.
template <class T>
void low_rank_rows(const Layers &a, const Part &part, const Multiplied &by, int64_t first, int64_t last, const T *x,
                   Thin &w) {
    int64_t P = PER_WORD<T>, M = last - first, rows = round_up(M, WHOLE_ROWS), K = whole(a.in) / P, column = 0;
    int64_t C = filled_columns(part, a.count);
    w.sums.resize(rows * C);
    w.small.resize(rows * C / P);
    along(w.along, x + first * a.in, a.in, M, a.in, rows, whole(a.in));
    multiply<T>(w.along.data(), K, by.A.data(), C, w.sums.data(), C, rows, C, K);
    keep_small(part, 0, a.count, w.sums.data(), C, M, (T *)part.small + (first - part.start) * part.ranks);
    fill<T>(w.small, w.sums.data(), rows, C, C, 0);
    for (int64_t i = 0; i < a.count; i++) {
        const Factors &f = part.layers[i];
        add_product(w.small.data() + column / P, C / P, by.B[i].data(), whole(a.outs[i]),
                    (T *)a.ys[i] + first * a.outs[i], M, a.outs[i], (f.rank + P - 1) / P, f.scale);
        column += round_up(f.rank, LANES);
    }
}

// The same, backward: the gradient of `small` into grads, and what it adds to grad_x, unless that is null.
template <class T>
void low_rank_rows_backward(const Layers &a, const Part &part, const Multiplied &by, int64_t first, int64_t last,
                            T *grads, T *grad_x, Thin &w) {
    int64_t P = PER_WORD<T>, M = last - first, rows = round_up(M, WHOLE_ROWS), column = 0;
    int64_t C = filled_columns(part, a.count);
    w.small.resize(rows * C / P);
    for (int64_t i = 0; i < a.count; i++) {
        const Factors &f = part.layers[i];
        int64_t R = round_up(f.rank, LANES), out = a.outs[i], K = whole(out) / P;
        if (!R) continue;
        along(w.along, (const T *)a.ys[i] + first * out, out, M, out, rows, whole(out));
        w.sums.resize(rows * R);
        multiply<T>(w.along.data(), K, by.B[i].data(), R, w.sums.data(), R, rows, R, K);
        for (float &value : w.sums) value *= f.scale;
        keep_small(part, i, 1, w.sums.data(), R, M, grads + (first - part.start) * part.ranks);
        fill<T>(w.small, w.sums.data(), rows, C, R, column);
        column += R;
    }
    if (grad_x)
        add_product(w.small.data(), C / P, by.A.data(), whole(a.in), grad_x + first * a.in, M, a.in, C / P, 1.0f);
}

// Columns of x (count, d) that are `stride` apart as words along the rows, with zeros around: (rows / PER_WORD, width).
template <class T>
const uint32_t *strip_down(Buffer &to, const T *x, int64_t stride, int64_t count, int64_t d, int64_t rows,
                           int64_t width) {
    to.resize(rows / PER_WORD<T> * width);
    auto row = [&](int64_t i, int64_t j) { return i < count && j < d ? load(x + i * stride + j, d - j) : Floats{}; };
    for (int64_t i = 0; i < rows; i += PER_WORD<T>)
        for (int64_t j = 0; j < width; j += LANES) {
            Words first = (Words)row(i, j);
            if (PER_WORD<T> == 2) first = first >> 16 | (Words)row(i + 1, j);
            write(&to[i / PER_WORD<T> * width + j], first);
        }
    return to.data();
}

// w.sums (rows, whole(N)) = small^T (rank, L), rows of which are `ranks` apart, times columns of x (L, N), which are
// `stride` apart; returns the number of rows, whole vectors of them.
template <class T>
int64_t sum_over_positions(const T *small, int64_t ranks, int64_t rank, const T *x, int64_t stride, int64_t L, int64_t N,
                           Thin &w) {
    int64_t rows = round_up(rank, std::max(WHOLE_ROWS, LANES)), width = whole(N);
    w.sums.assign(rows * width, 0);
    for (int64_t start = 0; start < L; start += POSITIONS) {
        int64_t count = std::min(POSITIONS, L - start), K = whole(count);
        strip_down(w.rows, small + start * ranks, ranks, count, rank, K, rows);
        turned(w.turned, w.rows.data(), K / PER_WORD<T>, rows);
        strip_down(w.strip, x + start * stride, stride, count, N, K, width);
        multiply<T, true>(w.turned.data(), K / PER_WORD<T>, w.strip.data(), width, w.sums.data(), width, rows, width,
                          K / PER_WORD<T>);
    }
    return rows;
}

// Columns n to n + N of grad_A in all layers of a part.
template <class T>
void grad_A_columns(const Layers &a, const Part &part, const T *grads, const T *x, int64_t n, Thin &w) {
    int64_t L = part.end - part.start, N = std::min(STRIP, a.in - n), before = 0;
    sum_over_positions(grads, part.ranks, part.ranks, x + part.start * a.in + n, a.in, L, N, w);
    for (int64_t i = 0; i < a.count; before += part.layers[i++].rank)
        for (int64_t r = 0; r < part.layers[i].rank; r++)
            std::memcpy(part.layers[i].grad_A + r * a.in + n, &w.sums[(before + r) * whole(N)], 4 * N);
}

// Rows n to n + N of grad_B in layer i of a part, before whose columns in `small` there are `before`.
template <class T>
void grad_B_rows(const Layers &a, const Part &part, int64_t i, int64_t before, int64_t n, Thin &w) {
    const Factors &f = part.layers[i];
    int64_t out = a.outs[i], N = std::min(STRIP, out - n);
    int64_t rows = sum_over_positions((const T *)part.small + before, part.ranks, f.rank,
                                      (const T *)a.ys[i] + part.start * out + n, out, part.end - part.start, N, w);
    auto result = (const float *)turned(w.turned, (const uint32_t *)w.sums.data(), rows, whole(N));
    for (int64_t j = 0; j < N; j++)
        for (int64_t r = 0; r < f.rank; r++) f.grad_B[(n + j) * f.rank + r] = result[j * rows + r] * f.scale;
}

// What threads take in turn: some positions of a part, or a strip of a gradient (layer -1: of all A).
struct Work {
    int64_t part, layer, before, first, last;
};

std::vector<Work> blocks_of_rows(const Layers &a, int64_t threads) {
    int64_t positions = 0;
    for (int64_t p = 0; p < a.parts; p++) positions += a.all[p].end - a.all[p].start;
    int64_t rows = std::min(MOST_ROWS, round_up(positions / (2 * threads) + 1, WHOLE_ROWS));
    std::vector<Work> blocks;
    for (int64_t p = 0; p < a.parts; p++)
        for (int64_t first = a.all[p].start; first < a.all[p].end && a.all[p].ranks; first += rows)
            blocks.push_back({p, 0, 0, first, std::min(first + rows, a.all[p].end)});
    return blocks;
}

std::vector<Work> strips_of_gradients(const Layers &a) {
    std::vector<Work> strips;
    for (int64_t p = 0; p < a.parts; p++) {
        int64_t before = 0;
        for (int64_t n = 0; n < a.in && a.all[p].ranks; n += STRIP) strips.push_back({p, -1, 0, n, 0});
        for (int64_t i = 0; i < a.count; before += a.all[p].layers[i++].rank)
            for (int64_t n = 0; n < a.outs[i] && a.all[p].layers[i].rank; n += STRIP)
                strips.push_back({p, i, before, n, 0});
    }
    return strips;
}

template <class T>
void low_rank_all(const Layers &a, const T *x, T *grad_x, bool backward, int64_t threads) {
    std::vector<Multiplied> multiplied(a.parts);
    for (Multiplied &each : multiplied) each.B.resize(a.count);
    std::vector<Work> blocks = blocks_of_rows(a, threads);
    std::vector<Work> strips = backward ? strips_of_gradients(a) : std::vector<Work>();
    std::vector<std::vector<T>> grads(a.parts);  // of each part's small
    if (backward)
        for (int64_t p = 0; p < a.parts; p++) grads[p].resize((a.all[p].end - a.all[p].start) * a.all[p].ranks);
#pragma omp parallel num_threads(threads)
    {
        static thread_local Thin w;
        tiles::InUse unit;
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < a.parts * (a.count + 1); n++) {
            int64_t p = n / (a.count + 1), i = n % (a.count + 1);
            if (i == a.count) lay_out_A<T>(a.all[p], a.count, a.in, backward, multiplied[p], w);
            else lay_out_B<T>(a.all[p].layers[i], a.outs[i], backward, multiplied[p].B[i], w);
        }
#pragma omp for schedule(dynamic)
        for (size_t n = 0; n < blocks.size(); n++) {
            const Work &block = blocks[n];
            const Part &part = a.all[block.part];
            const Multiplied &by = multiplied[block.part];
            if (backward)
                low_rank_rows_backward(a, part, by, block.first, block.last, grads[block.part].data(), grad_x, w);
            else low_rank_rows(a, part, by, block.first, block.last, x, w);
        }
#pragma omp for schedule(dynamic)
        for (size_t n = 0; n < strips.size(); n++) {
            const Work &s = strips[n];
            if (s.layer < 0) grad_A_columns(a, a.all[s.part], grads[s.part].data(), x, s.first, w);
            else grad_B_rows<T>(a, a.all[s.part], s.layer, s.before, s.first, w);
        }
    }
}

}  // namespace

// --------------------------------------------------------------------------------------------- what Python calls

// f(T) with the type that a tensor has.
template <class F>
void in_type(int64_t bf16, F f) {
    if (bf16) f(BF16());
    else f(float());
}

// f(A) with an activation by its place in activation.py's IN_KERNELS.
template <class F>
void in_activation(int64_t place, F f) {
    if (place == 0) f(SiLU());
    else if (place == 1) f(GELU());
    else if (place == 2) f(TanhGELU());
    else if (place == 3) f(ReLU());
    else f(ReLU2());
}

extern "C" {
// bf16: whether what is given as void * is in bf16 instead of fp32.

void norm(int64_t bf16, const void *x, const float *gain, const float *shift, double eps, void *y, float *means,
          float *inverses, int64_t rows, int64_t size, int64_t centred, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        auto all = centred ? norm_rows<T, true> : norm_rows<T, false>;
        all((const T *)x, gain, shift, eps, (T *)y, means, inverses, rows, size, threads);
    });
}

void norm_backward(int64_t bf16, const void *grad, const void *x, const float *gain, const float *means,
                   const float *inverses, void *grad_x, float *gain_sums, float *shift_sums, int64_t rows, int64_t size,
                   int64_t centred, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        auto all = centred ? norm_rows_backward<T, true> : norm_rows_backward<T, false>;
        all((const T *)grad, (const T *)x, gain, means, inverses, (T *)grad_x, gain_sums, shift_sums, rows, size,
            threads);
    });
}

// up: null if the activation is not gated.
void activate(int64_t bf16, const void *x, const void *up, void *y, int64_t activation, int64_t count,
              int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        in_activation(activation, [&](auto a) {
            using A = decltype(a);
            auto all = up ? activate_all<A, true, T> : activate_all<A, false, T>;
            all((const T *)x, (const T *)up, (T *)y, count, threads);
        });
    });
}

void activate_backward(int64_t bf16, const void *grad, const void *x, const void *up, void *grad_x, void *grad_up,
                       int64_t activation, int64_t count, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        in_activation(activation, [&](auto a) {
            using A = decltype(a);
            auto all = up ? activate_all_backward<A, true, T> : activate_all_backward<A, false, T>;
            all((const T *)grad, (const T *)x, (const T *)up, (T *)grad_x, (T *)grad_up, count, threads);
        });
    });
}

void dropout(int64_t bf16, const void *x, void *y, int64_t count, double factor, int64_t threshold, int64_t seed,
             int64_t other_seed, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        drop((const T *)x, (T *)y, count, factor, threshold, seed, other_seed, threads);
    });
}

void rotate(int64_t bf16, const void *x, const float *cos, const float *sin, double sign, void *y, int64_t batch,
            int64_t positions, int64_t heads, int64_t d, int64_t half, int64_t same_in_batch, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        rotate_all((const T *)x, cos, sin, sign, (T *)y, batch, positions, heads, d, half, same_in_batch, threads);
    });
}

void loss(int64_t bf16, void *logits, const int64_t *targets, float *losses, float *log_sums, int64_t rows,
          int64_t size, int64_t backward, double softcap, double z_loss, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        auto all = softcap ? loss_rows<T, true> : loss_rows<T, false>;
        all((T *)logits, targets, losses, log_sums, rows, size, backward, softcap, z_loss, threads);
    });
}

void attend(int64_t bf16, const void *q, const void *k, const void *v, void *y, float *log_sums, const Heads *a,
            int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        each_sample_and_key_head(*a, threads, [&](int64_t sample, int64_t head, Workspace &w) {
            attend_sample(*a, sample, head, (const T *)q, (const T *)k, (const T *)v, (T *)y, log_sums, w);
        });
    });
}

void attend_backward(int64_t bf16, const void *grad, const void *q, const void *k, const void *v, const float *log_sums,
                     void *grad_q, void *grad_k, void *grad_v, float *grad_sinks, const Heads *a, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        each_sample_and_key_head(*a, threads, [&](int64_t sample, int64_t head, Workspace &w) {
            attend_sample_backward(*a, sample, head, (const T *)grad, (const T *)q, (const T *)k, (const T *)v,
                                   log_sums, (T *)grad_q, (T *)grad_k, (T *)grad_v, grad_sinks, w);
        });
    });
}

// LoRA's part of several layers of one input, added to what the layers give.
void low_rank(int64_t bf16, const void *x, const Layers *layers, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        low_rank_all<T>(*layers, (const T *)x, nullptr, false, threads);
    });
}

// grad_x, or null: is added to.
void low_rank_backward(int64_t bf16, const void *x, void *grad_x, const Layers *layers, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        low_rank_all<T>(*layers, (const T *)x, (T *)grad_x, true, threads);
    });
}
}
