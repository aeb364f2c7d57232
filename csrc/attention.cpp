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

int64_t wide_of(const AttentionKernels& kernel, int64_t width) {
    return ceil_div(width, kernel.width_step) * kernel.width_step;
}

}  // namespace

int fb_attention(const FbAttention* problem, int threads) {
    const FbAttention& p = *problem;
    if (!valid(p)) return 1;
    const AttentionKernels& kernel = kernels_for(p.dtype);
    const int64_t wide = wide_of(kernel, p.width), tiles = ceil_div(p.length, ATTENTION_TILE);
    const int64_t pack_bytes = tiles * ATTENTION_TILE * wide * kernel.operand_bytes, each = kernel.forward_room(p.width);
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
        // The later queries, the more keys they see: long ones first.
        const int64_t parts = ceil_div(p.length, kernel.forward_queries);
        parallel_for_threads(count * share * parts, threads, [&](int64_t task, int thread) {
            const int64_t part = parts - 1 - task / (count * share), index = task % (count * share);
            const int64_t head = first + index / share;
            const char* keys = packs.data + index / share * 2 * pack_bytes;
            kernel.forward(head_of(p, head / p.kv_heads, head % p.kv_heads * share + index % share),
                           part * kernel.forward_queries, keys, keys + pack_bytes, rooms.data + thread * each);
        });
    }
    return 0;
}

namespace {

// Queries before it and from it on are two tasks of about as much work, as a query sees what is before it; 0: all are
// one. It depends on the length alone: so threads do not change a bit of the sums.
int64_t cut_of(int64_t length, int64_t block) {
    const int64_t blocks = ceil_div(length, block);
    return blocks < 2 ? 0 : std::min(blocks - 1, (blocks * 181 + 128) / 256) * block;  // 1 / sqrt(2)
}

}  // namespace

int fb_attention_grad(const FbAttention* problem, int threads) {
    const FbAttention& p = *problem;
    if (!valid(p)) return 1;
    const AttentionKernels& kernel = kernels_for(p.dtype);
    const int64_t wide = wide_of(kernel, p.width), group = p.heads / p.kv_heads, cut = cut_of(p.length, kernel.backward_queries);
    const auto values = [&](int64_t rows) { return ceil_div(rows, ATTENTION_TILE) * ATTENTION_TILE * wide; };
    const int64_t packs = 3 * values(p.length) * kernel.operand_bytes, early = 2 * values(cut) * int64_t(sizeof(float));
    const int64_t late = 2 * values(p.length) * int64_t(sizeof(float)), each = kernel.backward_room(p.width);
    // So many key-value heads are in work at a time.
    const int64_t all = p.batch * p.kv_heads, wave = std::min<int64_t>(all, std::max(threads, 1));
    const Room heads_room((packs + early + late) * wave), rooms(each * std::max(threads, 1));
    if (heads_room.data == nullptr || rooms.data == nullptr) return 2;
    for (int64_t first = 0; first < all; first += wave) {
        const int64_t count = std::min(wave, all - first);
        const auto room_of = [&](int64_t index) { return heads_room.data + index * (packs + early + late); };
        const auto head = [&](int64_t index, int64_t g) {
            return head_of(p, (first + index) / p.kv_heads, (first + index) % p.kv_heads * group + g);
        };
        parallel_for_threads(count, threads, [&](int64_t index, int thread) {
            kernel.pack_backward(head(index, 0), room_of(index), rooms.data + thread * each);
        });
        const int64_t parts = cut ? 2 : 1;
        parallel_for_threads(count * parts, threads, [&](int64_t task, int thread) {
            const int64_t index = task / parts;
            const bool is_late = parts == 1 || task % 2 == 1;
            std::vector<AttentionHead> heads;
            for (int64_t g = 0; g < group; ++g) heads.push_back(head(index, g));
            kernel.backward(heads.data(), group, is_late ? cut : 0, is_late ? p.length : cut, room_of(index),
                            reinterpret_cast<float*>(room_of(index) + packs + (is_late ? early : 0)),
                            rooms.data + thread * each);
        });
        parallel_for_threads(count, threads, [&](int64_t index, int thread) {
            const char* sums = room_of(index) + packs;
            kernel.finish(head(index, 0), cut, reinterpret_cast<const float*>(sums),
                          reinterpret_cast<const float*>(sums + early), rooms.data + thread * each);
        });
    }
    return 0;
}
