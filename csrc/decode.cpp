// One token for each of a few rows through all decoder layers, in one call: what is small beside a product costs
// its own time and not that of calls from outside.
#include <algorithm>
#include <cstring>

#include "convert.h"
#include "fourbit.h"
#include "kernels.h"
#include "parallel.h"
#include "panels.h"

namespace {

// Multiply-adds below which waking other threads costs more than they save.
constexpr int64_t SERIAL_WORK = 1 << 17;

int with_work(int64_t work, int threads) { return work < SERIAL_WORK ? 1 : threads; }

struct Rooms {
    Room normed, q, k, v, attended, out, gate, up, low, low_wide, wide, scales, each;
};

char* at(void* base, int64_t index, int dtype) { return static_cast<char*>(base) + index * dtype_bytes(dtype); }

class Step {
  public:
    Step(const FbDecode& problem, Rooms& rooms, int threads) : d(problem), rooms(rooms), threads(threads) {}

    int run() {
        const int64_t H = d.hidden_size, wide = d.heads * d.width, narrow = d.kv_heads * d.width;
        const int64_t F = d.feed_forward;
        void *normed = room(rooms.normed, H), *out = room(rooms.out, H), *q = room(rooms.q, wide);
        void *k = room(rooms.k, narrow), *v = room(rooms.v, narrow), *attended = room(rooms.attended, wide);
        void *gate = room(rooms.gate, F), *up = room(rooms.up, F);
        float* scales = rooms.scales.at_least<float>(d.rows * d.heads);
        if (!normed || !out || !q || !k || !v || !attended || !gate || !up || !scales) return 2;
        for (int64_t i = 0; i < d.layers; ++i) {
            const FbDecodeLayer& layer = d.layer[i];
            norm(d.hidden, d.rows, H, layer.input_norm, normed, scales);
            linear(layer.q, normed, q), linear(layer.k, normed, k), linear(layer.v, normed, v);
            if (layer.q_norm) norm(q, d.rows * d.heads, d.width, layer.q_norm, q, scales);
            if (layer.k_norm) norm(k, d.rows * d.kv_heads, d.width, layer.k_norm, k, scales);
            keep(layer, q, k, v);
            attend(layer, q, attended);
            linear(layer.o, attended, out);
            kernels().add(d.hidden, out, d.dtype, d.rows * H);
            norm(d.hidden, d.rows, H, layer.output_norm, normed, scales);
            linear(layer.gate, normed, gate), linear(layer.up, normed, up);
            fb_gated(gate, up, d.dtype, d.rows * F, d.activation, gate, with_work(d.rows * F * 16, threads));
            linear(layer.down, gate, out);
            kernels().add(d.hidden, out, d.dtype, d.rows * H);
            if (status) return status;
        }
        return 0;
    }

  private:
    const FbDecode& d;
    Rooms& rooms;
    int threads, status = 0;

    void* room(Room& where, int64_t width) { return where.at_least<char>(d.rows * width * dtype_bytes(d.dtype)); }

    void norm(const void* x, int64_t rows, int64_t width, const float* weight, void* y, float* scales) {
        fb_rms_norm(x, nullptr, d.dtype, rows, width, weight, d.eps, nullptr, y, scales, with_work(rows * width * 8, threads));
    }

    void linear(const FbDecodeLinear& layer, const void* x, void* y) {
        FbProduct p = layer.product;
        p.x = x, p.y = y, p.rows = d.rows, p.dtype = d.dtype;
        if (d.rows > d.few_rows) {
            p.low = room(rooms.low, std::max<int64_t>(1, p.rank));
            status = status ? status : p.low ? fb_product(&p, threads) : 2;
            return;
        }
        const int found = fb_linear_4bit(x, d.dtype, d.rows, p.in_features, p.out_features, p.codes, p.absmax,
                                         p.nested_absmax, p.offset, p.map, p.block_size, p.codebook, p.bias, y, threads);
        status = status ? status : found;
        if (p.rank && !status) add_adapter(layer, p);
    }

    // y += (x A^T) (scaling B)^T, all in fp32 and rounded once.
    void add_adapter(const FbDecodeLinear& layer, const FbProduct& p) {
        const int64_t K = p.in_features, N = p.out_features, r = p.rank;
        float *wide = rooms.wide.at_least<float>(d.rows * K), *low = rooms.low_wide.at_least<float>(d.rows * r);
        if (!wide || !low) {
            status = 2;
            return;
        }
        parallel_for(d.rows, with_work(d.rows * r * (K + N), threads), [&](int64_t row) {
            float *own = wide + row * K, *down = low + row * r;
            kernels().widen(at(const_cast<void*>(p.x), row * K, d.dtype), d.dtype, K, own);
            for (int64_t j = 0; j < r; ++j) down[j] = kernels().dot(own, p.a + j * K, K);
            kernels().add_low({down, layer.up, r, N, d.dtype, at(p.y, row * N, d.dtype)});
        });
    }

    // Rotates queries and keys and puts keys and values into the last slot of the cache.
    void keep(const FbDecodeLayer& layer, void* q, void* k, void* v) {
        const int64_t bytes = d.width * dtype_bytes(d.dtype);
        for (int64_t row = 0; row < d.rows; ++row) {
            const float *cos = d.cos + row * d.width, *sin = d.sin + row * d.width;
            void *queries = at(q, row * d.heads * d.width, d.dtype), *keys = at(k, row * d.kv_heads * d.width, d.dtype);
            kernels().rotate({queries, queries, d.dtype, d.heads, d.width, d.width, cos, sin});
            kernels().rotate({keys, keys, d.dtype, d.kv_heads, d.width, d.width, cos, sin});
            for (int64_t head = 0; head < d.kv_heads; ++head) {
                const int64_t place = row * d.kv_heads + head;
                const int64_t slot = (place * d.room + d.slots - 1) * d.width;
                std::memcpy(at(layer.keys, slot, d.dtype), at(k, place * d.width, d.dtype), size_t(bytes));
                std::memcpy(at(layer.values, slot, d.dtype), at(v, place * d.width, d.dtype), size_t(bytes));
            }
        }
    }

    void attend(const FbDecodeLayer& layer, void* q, void* out) {
        const int64_t group = d.heads / d.kv_heads, places = d.rows * d.kv_heads, each = 2 * d.width + d.slots;
        float* scratch = rooms.each.at_least<float>(places * each);
        if (!scratch) {
            status = 2;
            return;
        }
        parallel_for(places, with_work(d.rows * d.heads * d.slots * d.width * 2, threads), [&](int64_t place) {
            const int64_t first = place * group * d.width, cache = place * d.room * d.width;
            kernels().attend({at(q, first, d.dtype), at(layer.keys, cache, d.dtype), at(layer.values, cache, d.dtype),
                              d.positions + place / d.kv_heads * d.slots, d.slots, layer.window, group, d.width,
                              d.scale, d.dtype, scratch + place * each, at(out, first, d.dtype)});
        });
    }
};

}  // namespace

int fb_dense(const void* x, const void* weight, int dtype, int64_t M, int64_t K, int64_t N, void* y, int threads) {
    if (!known_dtype(dtype) || M <= 0 || K <= 0 || N < 0) return 1;
    constexpr int64_t TASK_ROWS = 32, MOST = 4;
    if (M > MOST) return 1;
    thread_local Room wide;
    float* prepared = wide.at_least<float>(M * K);
    if (!prepared) return 2;
    kernels().widen(x, dtype, M * K, prepared);
    parallel_for(ceil_div(N, TASK_ROWS), with_work(M * K * N, threads), [&](int64_t task) {
        const int64_t first = task * TASK_ROWS, count = std::min(TASK_ROWS, N - first);
        float sums[MOST * TASK_ROWS];
        const char* rows = static_cast<const char*>(weight) + first * K * dtype_bytes(dtype);
        kernels().dense({prepared, M, K, rows, count, dtype, sums});
        for (int64_t m = 0; m < M; ++m)
            for (int64_t n = 0; n < count; ++n) store_value(y, dtype, m * N + first + n, sums[m * count + n]);
    });
    return 0;
}

int fb_decode(const FbDecode* problem, int threads) {
    const FbDecode& d = *problem;
    if (!known_dtype(d.dtype) || d.rows <= 0 || d.layers < 0 || d.slots <= 0 || d.slots > d.room) return 1;
    if (d.heads <= 0 || d.kv_heads <= 0 || d.heads % d.kv_heads || d.width <= 0 || d.width % 2) return 1;
    thread_local Rooms rooms;
    return Step(d, rooms, threads).run();
}
