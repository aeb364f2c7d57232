// Keyed dropout, portable: Philox4x32-10 (Salmon et al., SC 2011), one counter for eight elements.
#include "convert.h"
#include "kernels.h"
#include "philox.h"

namespace scalar {

void dropout(const DropoutRow& row) {
    for (int64_t k = 0; k < row.K; k += 8) {
        uint32_t counter[4] = {row.row, row.position, uint32_t(k / 8), row.layer};
        uint32_t key[2] = {row.key[0], row.key[1]};
        for (int round = 0; round < PHILOX_ROUNDS; ++round) {
            const uint64_t product0 = uint64_t(PHILOX_M0) * counter[0];
            const uint64_t product1 = uint64_t(PHILOX_M1) * counter[2];
            counter[0] = uint32_t(product1 >> 32) ^ counter[1] ^ key[0];
            counter[1] = uint32_t(product1);
            counter[2] = uint32_t(product0 >> 32) ^ counter[3] ^ key[1];
            counter[3] = uint32_t(product0);
            key[0] += PHILOX_W0;
            key[1] += PHILOX_W1;
        }
        for (int64_t i = 0; i < 8 && k + i < row.K; ++i) {
            const uint32_t bits = counter[i / 2] >> (i % 2 * 16) & 0xffffu;
            const float value = load_value(row.x, row.dtype, k + i) * row.scale;
            store_value(row.y, row.dtype, k + i, bits < row.threshold ? 0.0f : value);
        }
    }
}

}  // namespace scalar
