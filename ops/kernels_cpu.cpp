// What norm.py, activation.py, rotation.py, loss.py and attention.py compute on a CPU, in fp32 or bf16, with all
// arithmetic in fp32.
//
// cpp.py compiles this file once with g++ and calls it through ctypes; the plain references are in those files, that of
// attention in model.py. Each row, head or sample is one thread's work, from the first number to the last: results do not depend
// on which thread takes it.

#include "vectors.h"

namespace {

// ----------------------------------------------------------------------------------------------- norm, SwiGLU, rotation

// y = x / rms(x) * weight for each of `rows` rows; inverse (rows,) receives 1 / rms(x).
template <class T>
void rms_norm_rows(const T *x, const float *weight, float eps, T *y, float *inverse, int64_t rows, int64_t size,
                   int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const T *from = x + row * size;
        Floats squares = {};
        for (int64_t i = 0; i < size; i += LANES) {
            Floats value = load(from + i, size - i);
            squares += value * value;
        }
        float scale = inverse[row] = 1 / std::sqrt(sum(squares) / size + eps);
        for (int64_t i = 0; i < size; i += LANES)
            store(y + row * size + i, load(from + i, size - i) * scale * load(weight + i, size - i), size - i);
    }
}

// grad_x, and into sums (threads, size), if not null, each thread's part of the weight's gradient.
template <class T>
void rms_norm_rows_backward(const T *grad, const T *x, const float *weight, const float *inverse, T *grad_x,
                            float *sums, int64_t rows, int64_t size, int64_t threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t part = 0; part < threads; part++)
        for (int64_t row = rows * part / threads; row < rows * (part + 1) / threads; row++) {
            const T *g = grad + row * size, *from = x + row * size;
            float scale = inverse[row];
            Floats products = {};
            for (int64_t i = 0; i < size; i += LANES)
                products += load(g + i, size - i) * load(weight + i, size - i) * load(from + i, size - i);
            float along = sum(products) * scale * scale / size;
            for (int64_t i = 0; i < size; i += LANES) {
                Floats value = load(from + i, size - i), gradient = load(g + i, size - i);
                Floats straight = gradient * load(weight + i, size - i);
                store(grad_x + row * size + i, (straight - value * along) * scale, size - i);
                if (!sums) continue;
                float *to = sums + part * size + i;
                store(to, load(to, size - i) + gradient * value * scale, size - i);
            }
        }
}

constexpr int64_t STRETCH = 4096;  // numbers that a thread takes at a time where each is by itself

template <class T>
void swiglu_all(const T *gate, const T *up, T *y, int64_t count, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < count; start += STRETCH)
        for (int64_t i = start; i < std::min(count, start + STRETCH); i += LANES) {
            Floats g = load(gate + i, count - i);
            store(y + i, g * sigmoid(g) * load(up + i, count - i), count - i);
        }
}

template <class T>
void swiglu_all_backward(const T *grad, const T *gate, const T *up, T *grad_gate, T *grad_up, int64_t count,
                         int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < count; start += STRETCH)
        for (int64_t i = start; i < std::min(count, start + STRETCH); i += LANES) {
            Floats g = load(gate + i, count - i), gradient = load(grad + i, count - i), s = sigmoid(g);
            store(grad_up + i, gradient * g * s, count - i);
            store(grad_gate + i, gradient * load(up + i, count - i) * s * (1.0f + g * (1.0f - s)), count - i);
        }
}

// y = x turned, for x (batch, positions, heads, d); cos, sin (batch or 1, positions, d/2). sign -1 turns back.
template <class T>
void rotate_all(const T *x, const float *cos, const float *sin, float sign, T *y, int64_t batch, int64_t positions,
                int64_t heads, int64_t d, bool same_in_batch, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t place = 0; place < batch * positions; place++) {
        int64_t half = d / 2, angle = (same_in_batch ? place % positions : place) * half;
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = 0; i < half; i += LANES) {
                const T *from = x + (place * heads + h) * d + i;
                T *to = y + (place * heads + h) * d + i;
                Floats c = load(cos + angle + i, half - i), s = load(sin + angle + i, half - i) * sign;
                Floats first = load(from, half - i), second = load(from + half, half - i);
                store(to, first * c - second * s, half - i);
                store(to + half, second * c + first * s, half - i);
            }
    }
}

// ------------------------------------------------------------------------------------------------------------ the loss

// losses (rows,) = -log softmax(logits)[target], NaN if there is no such logit; with `backward` the logits become their
// gradient: softmax, less 1 at the target.
template <class T>
void loss_rows(T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t size, bool backward,
               int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        T *x = logits + row * size;
        int64_t target = targets[row];
        if (target < 0 || target >= size) {
            losses[row] = NAN;
            continue;
        }
        Floats tops = Floats{} - INFINITY, sums = {};
        for (int64_t i = 0; i < size; i += LANES) tops = larger(tops, load(x + i, size - i, -INFINITY));
        float top = largest(tops);
        for (int64_t i = 0; i < size; i += LANES) sums += exp_negative(load(x + i, size - i, -INFINITY) - top);
        float total = sum(sums);
        losses[row] = std::log(total) + top - load(x + target, 1)[0];
        if (!backward) continue;
        for (int64_t i = 0; i < size; i += LANES)
            store(x + i, exp_negative(load(x + i, size - i) - top) * (1 / total), size - i);
        store(x + target, Floats{} + (load(x + target, 1)[0] - 1), 1);
    }
}

// ---------------------------------------------------------------------------------------------------------- attention
//
// Everything is copied into words (vectors.h) and filled up with zeros to whole products first, which costs little: a
// head's q, k and v are small, their products are not.

constexpr int64_t QUERIES = 32;  // queries of a head that attend together

typedef std::vector<uint32_t> Buffer;

// x (count, d), whose rows are `stride` apart, as (rows, width) with zeros around it: words along d.
template <class T>
const uint32_t *along(Buffer &to, const T *x, int64_t stride, int64_t count, int64_t d, int64_t rows, int64_t width) {
    to.resize(rows * width / PER_WORD<T>);
    for (int64_t i = 0; i < rows; i++) {
        T *row = (T *)to.data() + i * width;
        int64_t filled = i < count ? d : 0;
        std::memcpy(row, x + i * stride, filled * sizeof(T));
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
    float scale;
};

namespace {

struct Workspace {
    Buffer rows, k_along, v_along, k_across, v_down, k_turned, q_across, q_down, y_across, y_down;
    Buffer weights, grads, pairs;
    std::vector<float> scores, through, result, grad_k, grad_v;
};

// weights (N,) = exp(scale * score - the largest of them) from `low` to `high`, 0 elsewhere; their sum.
template <class T>
float softmax(const float *scores, T *weights, int64_t N, int64_t low, int64_t high, float scale, float *log_sum) {
    Floats tops = Floats{} - INFINITY, sums = {};
    int64_t first = low / LANES * LANES, end = high / LANES * LANES + LANES;
    auto seen = [&](int64_t n, Floats value, float otherwise) {
        if (n >= low && n + LANES <= high + 1) return value;
        Ints place = lane_numbers() + (int32_t)n;
        return (place >= (int32_t)low) & (place <= (int32_t)high) ? value : Floats{} + otherwise;
    };
    for (int64_t n = first; n < end; n += LANES) tops = larger(tops, seen(n, load(scores + n), -INFINITY));
    float top = largest(tops) * scale;
    for (int64_t n = 0; n < first; n += LANES) store(weights + n, Floats{});
    for (int64_t n = first; n < end; n += LANES) {
        Floats weight = seen(n, exp_negative(load(scores + n) * scale - top), 0);
        sums += weight;
        store(weights + n, weight);
    }
    for (int64_t n = end; n < N; n += LANES) store(weights + n, Floats{});
    float total = sum(sums);
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
                float *log_sum = log_sums + (start + query) * H + h;
                totals[i] = softmax(w.scores.data() + i * N, (T *)w.weights.data() + i * N, N, low - begin,
                                    query - begin, a.scale, log_sum);
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
// weights.
template <class T>
void softmax_backward(float *scores, const float *through, const float *log_sums, int64_t M, int64_t ahead,
                      const Heads &a, T *weights, T *grads) {
    constexpr int64_t V = QUERIES / LANES;
    const int64_t window = a.window ? a.window : INT32_MAX;
    Floats dots[V] = {};  // of each query's weights with their gradients
    for (int64_t m = 0; m < M; m++)
        for (int64_t v = 0; v < V; v++) {
            int64_t nearest = v * LANES - ahead - m;  // positions from the key to the first query
            float *score = scores + m * QUERIES + v * LANES;
            Floats weight = exp_negative(load(score) * a.scale - load(log_sums + v * LANES));
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
            store(grads + at, load(scores + at) * (load(through + at) - dots[v]) * a.scale);
        }
}

// The gradients of a key head's k and v in one sample, and of the q of all query heads that share it. The weights are
// computed again, turned: keys down, queries across, so that sums over queries and over keys need no other layout.
template <class T>
void attend_sample_backward(const Heads &a, int64_t sample, int64_t key_head, const T *grad, const T *q, const T *k,
                            const T *v, const float *log_sums, T *grad_q, T *grad_k, T *grad_v, Workspace &w) {
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
            float kept[QUERIES] = {};
            for (int64_t i = 0; i < count; i++) kept[i] = log_sums[(start + first + i) * H + h];
            softmax_backward(scores, through, kept, M, begin - first, a, (T *)w.weights.data(), (T *)w.grads.data());
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

// --------------------------------------------------------------------------------------------- what Python calls

// f(T) with the type that a tensor has.
template <class F>
void in_type(int64_t bf16, F f) {
    if (bf16) f(BF16());
    else f(float());
}

extern "C" {
// bf16: whether what is given as void * is in bf16 instead of fp32.

void rms_norm(int64_t bf16, const void *x, const float *weight, double eps, void *y, float *inverse, int64_t rows,
              int64_t size, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        rms_norm_rows((const T *)x, weight, eps, (T *)y, inverse, rows, size, threads);
    });
}

void rms_norm_backward(int64_t bf16, const void *grad, const void *x, const float *weight, const float *inverse,
                       void *grad_x, float *sums, int64_t rows, int64_t size, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        rms_norm_rows_backward((const T *)grad, (const T *)x, weight, inverse, (T *)grad_x, sums, rows, size, threads);
    });
}

void swiglu(int64_t bf16, const void *gate, const void *up, void *y, int64_t count, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        swiglu_all((const T *)gate, (const T *)up, (T *)y, count, threads);
    });
}

void swiglu_backward(int64_t bf16, const void *grad, const void *gate, const void *up, void *grad_gate, void *grad_up,
                     int64_t count, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        swiglu_all_backward((const T *)grad, (const T *)gate, (const T *)up, (T *)grad_gate, (T *)grad_up, count,
                            threads);
    });
}

void rotate(int64_t bf16, const void *x, const float *cos, const float *sin, double sign, void *y, int64_t batch,
            int64_t positions, int64_t heads, int64_t d, int64_t same_in_batch, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        rotate_all((const T *)x, cos, sin, sign, (T *)y, batch, positions, heads, d, same_in_batch, threads);
    });
}

void loss(int64_t bf16, void *logits, const int64_t *targets, float *losses, int64_t rows, int64_t size,
          int64_t backward, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        loss_rows((T *)logits, targets, losses, rows, size, backward, threads);
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
                     void *grad_q, void *grad_k, void *grad_v, const Heads *a, int64_t threads) {
    in_type(bf16, [&](auto type) {
        using T = decltype(type);
        each_sample_and_key_head(*a, threads, [&](int64_t sample, int64_t head, Workspace &w) {
            attend_sample_backward(*a, sample, head, (const T *)grad, (const T *)q, (const T *)k, (const T *)v,
                                   log_sums, (T *)grad_q, (T *)grad_k, (T *)grad_v, w);
        });
    });
}
}
