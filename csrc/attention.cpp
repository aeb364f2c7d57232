// Attention: argument checks, scratch memory and the split over threads.
#include <algorithm>
#include <new>
#include <vector>

#include "convert.h"
#include "fourbit.h"
#include "kernels.h"
#include "parallel.h"

namespace {

// Memory for one call, aligned to cache lines; empty where there is none.
struct Room {
    char* data;
    explicit Room(int64_t bytes)
        : data(static_cast<char*>(::operator new(size_t(bytes), std::align_val_t(64), std::nothrow))) {}
    ~Room() { ::operator delete(data, std::align_val_t(64)); }
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;
};

const AttentionKernels& kernels_for(int dtype) {
    return dtype == BF16 ? *kernels().attention : *kernels().attention_wide;
}

constexpr int64_t PACKED_AT_ONCE = 16 << 20;

AttentionHead head_of(const FbAttention& p, int64_t batch, int64_t head) {
    const int64_t kv = head / (p.heads / p.kv_heads);
    const auto tensor = [&](const FbAttentionTensor& t, int64_t index) {
        const int64_t bytes = dtype_bytes(p.dtype);
        return AttentionTensor{static_cast<char*>(t.data) + (batch * t.batch + index * t.head) * bytes, t.row * bytes};
    };
    AttentionHead h;
    h.q = tensor(p.q, head);
    h.k = tensor(p.k, kv);
    h.v = tensor(p.v, kv);
    h.o = tensor(p.o, head);
    h.grad = tensor(p.grad, head);
    h.dq = tensor(p.dq, head);
    h.dk = tensor(p.dk, kv);
    h.dv = tensor(p.dv, kv);
    h.first = p.first + batch * p.length;
    h.lse = p.lse + (batch * p.heads + head) * p.length;
    h.dtype = p.dtype;
    h.length = p.length;
    h.width = p.width;
    h.scale = p.scale;
    return h;
}

bool valid(const FbAttention& p) {
    if (!known_dtype(p.dtype) || p.batch < 0 || p.length <= 0 || p.width <= 0 || p.width > ATTENTION_MAX_WIDTH)
        return false;
    if (p.kv_heads <= 0 || p.heads <= 0 || p.heads % p.kv_heads != 0) return false;
    for (int64_t i = 0; i < p.batch; ++i)
        for (int64_t t = 0; t < p.length; ++t)
            if (p.first[i * p.length + t] < 0 || p.first[i * p.length + t] > t) return false;
    return true;
}

// Scratch of a thread: at most what `Attention::scratch` takes, four rows of operands and three of floats.
int64_t scratch_bytes(int64_t wide) {
    return ATTENTION_TILE * (4 * wide * 4 + 4 * ATTENTION_TILE * 4 + 2 * ATTENTION_TILE * 4 + wide * 4) + 16 * 64;
}

int64_t wide_of(const AttentionKernels& kernel, int64_t width) {
    return ceil_div(width, kernel.width_step) * kernel.width_step;
}

}  // namespace

int fb_attention(const FbAttention* problem, int threads) {
    const FbAttention& p = *problem;
    if (!valid(p)) return 1;
    const AttentionKernels& kernel = kernels_for(p.dtype);
    const int64_t wide = wide_of(kernel, p.width), tiles = ceil_div(p.length, ATTENTION_TILE);
    const int64_t pack_bytes = tiles * ATTENTION_TILE * wide * kernel.operand_bytes, each = scratch_bytes(wide);
    // So many key-value heads are packed at a time: enough to occupy the threads, but not gigabytes.
    const int64_t all = p.batch * p.kv_heads, share = p.heads / p.kv_heads;
    const int64_t group = std::min(all, std::max<int64_t>(threads, PACKED_AT_ONCE / (2 * pack_bytes)));
    const Room packs(group * 2 * pack_bytes), rooms(each * std::max(threads, 1));
    if (packs.data == nullptr || rooms.data == nullptr) return 2;
    for (int64_t first = 0; first < all; first += group) {
        const int64_t count = std::min(group, all - first);
        parallel_for_threads(count, threads, [&](int64_t task, int thread) {
            const int64_t kv = (first + task) % p.kv_heads;
            char* keys = packs.data + task * 2 * pack_bytes;
            kernel.pack(head_of(p, (first + task) / p.kv_heads, kv * share), keys, keys + pack_bytes,
                        rooms.data + thread * each);
        });
        // The later a tile of queries, the more keys it sees: long ones first.
        parallel_for_threads(count * share * tiles, threads, [&](int64_t task, int thread) {
            const int64_t tile = tiles - 1 - task / (count * share), index = task % (count * share);
            const int64_t head = first + index / share;
            const char* keys = packs.data + index / share * 2 * pack_bytes;
            kernel.forward(head_of(p, head / p.kv_heads, head % p.kv_heads * share + index % share),
                           tile * ATTENTION_TILE, keys, keys + pack_bytes, rooms.data + thread * each);
        });
    }
    return 0;
}

int fb_attention_grad(const FbAttention* problem, int threads) {
    const FbAttention& p = *problem;
    if (!valid(p)) return 1;
    const AttentionKernels& kernel = kernels_for(p.dtype);
    const int64_t wide = wide_of(kernel, p.width), tiles = ceil_div(p.length, ATTENTION_TILE), group = p.heads / p.kv_heads;
    const int64_t values = tiles * ATTENTION_TILE * wide, scratch = scratch_bytes(wide);
    const int64_t packs = 3 * values * kernel.operand_bytes, sums = 2 * values * 4, dq = ATTENTION_TILE * wide * 4;
    const int64_t each = packs + sums + dq + scratch;
    const int used = int(std::min<int64_t>(std::max(threads, 1), p.batch * p.kv_heads));
    const Room rooms(each * used);
    if (rooms.data == nullptr) return 2;
    parallel_for_threads(p.batch * p.kv_heads, used, [&](int64_t task, int thread) {
        char* room = rooms.data + thread * each;
        std::vector<AttentionHead> heads;
        for (int64_t g = 0; g < group; ++g)
            heads.push_back(head_of(p, task / p.kv_heads, task % p.kv_heads * group + g));
        kernel.backward(heads.data(), group, room, reinterpret_cast<float*>(room + packs),
                        reinterpret_cast<float*>(room + packs + sums), room + packs + sums + dq);
    });
    return 0;
}
