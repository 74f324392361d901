// Digest, copy and compare chunks of device memory.
//
// A row of the table names at most a chunk of bytes, anywhere, of any size and alignment; a warp
// takes a row. The digest is XXH3-64 with seed 0, as the host library computes it (the algorithm:
// xxhash_spec.md of github.com/Cyan4973/xxHash). No byte outside a row is read or written.
//
// How a warp digests: XXH3 keeps eight accumulators and feeds them stripes of 64 bytes. Within a
// block of 16 stripes the order does not matter. So four neighbouring lanes hold two accumulators
// each and read 16 bytes of a stripe each; the eight such groups take stripes 0 to 7, then 8 to 15.
// Their sums are added by shuffles once a block, and every lane does the scrambling that ends it.
//
// The same text is C++ for the host, where the tests hold it against the host library. What lanes
// do on their own is written in EACH_LANE blocks, which the host runs 32 times; what they hold
// across blocks is in Lanes<T>, one T on the device, 32 on the host.
//
// scripts/compile_kernels.py compiles this file. Run it after every change.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Blocks of 1 KiB that a warp has in flight, and warps of 32 lanes on a multiprocessor.
#ifndef AHEAD
#define AHEAD 2
#endif
#ifndef WARPS_AT_ONCE
#define WARPS_AT_ONCE 32
#endif
#define THREADS 128

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
#define RARE __device__ __noinline__ // away from the registers of the loop
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, WARPS_AT_ONCE * 32 / THREADS)
#define TABLE __device__ const
#define EACH_LANE if (const int lane = threadIdx.x & 31; true)

template <typename T>
struct Lanes {
    T own;
    DEVICE T &operator[](int) { return own; }
};

DEVICE u64 row_number() { return (u64(blockIdx.x) * blockDim.x + threadIdx.x) / 32; }

DEVICE u64 high_half(u64 a, u64 b) { return __umul64hi(a, b); }

template <typename T>
DEVICE T load(u64 address) {
    return *reinterpret_cast<const T *>(address);
}

template <typename T>
DEVICE void store(u64 address, T value) {
    *reinterpret_cast<T *>(address) = value;
}

// The sum of a value over the lanes that differ in these bits of their number, in each of them.
template <int FIRST, int LAST>
DEVICE void add_up(Lanes<u64> &value) {
#pragma unroll
    for (int bit = FIRST; bit <= LAST; bit *= 2)
        value.own += __shfl_xor_sync(0xFFFFFFFFu, value.own, bit);
}

DEVICE u64 of_first_lane(Lanes<u64> &value) { return __shfl_sync(0xFFFFFFFFu, value.own, 0); }

#else

#include <cstring>

#define DEVICE static inline
#define RARE static
#define KERNEL extern "C" __attribute__((visibility("hidden"))) void
#define TABLE static const
#define EACH_LANE for (int lane = 0; lane < 32; ++lane)

template <typename T>
struct Lanes {
    T all[32];
    T &operator[](int lane) { return all[lane]; }
};

static thread_local u64 host_row_number;
DEVICE u64 row_number() { return host_row_number; }

DEVICE u64 high_half(u64 a, u64 b) { return u64((unsigned __int128)a * b >> 64); }

template <typename T>
DEVICE T load(u64 address) {
    T value;
    std::memcpy(&value, reinterpret_cast<const void *>(address), sizeof value);
    return value;
}

template <typename T>
DEVICE void store(u64 address, T value) {
    std::memcpy(reinterpret_cast<void *>(address), &value, sizeof value);
}

template <int FIRST, int LAST>
DEVICE void add_up(Lanes<u64> &value) {
    for (int bit = FIRST; bit <= LAST; bit *= 2) {
        const Lanes<u64> before = value;
        for (int lane = 0; lane < 32; ++lane) value.all[lane] += before.all[lane ^ bit];
    }
}

DEVICE u64 of_first_lane(Lanes<u64> &value) { return value.all[0]; }

#endif

struct Row {
    u64 source, target, size_bytes, index;
};

// Two neighbouring 64-bit words.
struct alignas(16) Pair {
    u64 first, second;
};

// The default secret of XXH3.
TABLE u64 SECRET[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072,
    0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0,
    0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8,
    0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};
constexpr u64 PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
constexpr u64 PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F;
constexpr u64 PRIME64_3 = 0x165667B19E3779F9, PRIME64_4 = 0x85EBCA77C2B2AE63;
constexpr u64 PRIME64_5 = 0x27D4EB2F165667C5;
constexpr u64 STRIPE = 64, BLOCK = 1024, HALF_BLOCK = 512;

// -------------------------------------------------------------------------------- reading, mixing

// 64 bits of the secret from any byte of it.
RARE u64 secret(u32 offset) {
    const u64 low = SECRET[offset / 8];
    const u32 bits = 8 * (offset % 8);
    return bits ? low >> bits | SECRET[offset / 8 + 1] << (64 - bits) : low;
}

// 64 bits in units of UNIT bytes, to which the address is aligned.
template <int UNIT>
DEVICE u64 read64(u64 address) {
    if (UNIT == 4) return load<u32>(address) | u64(load<u32>(address + 4)) << 32;
    u64 value = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) value |= u64(load<u8>(address + i)) << (8 * i);
    return value;
}

template <int UNIT>
DEVICE Pair read_pair(u64 address) {
    if (UNIT == 16) return load<Pair>(address);
    return {read64<UNIT>(address), read64<UNIT>(address + 8)};
}

DEVICE u64 fold(u64 a, u64 b) { return a * b ^ high_half(a, b); }

DEVICE u64 avalanche(u64 hash) {
    hash = (hash ^ hash >> 37) * 0x165667919E3779F9;
    return hash ^ hash >> 32;
}

DEVICE u64 avalanche_of_xxh64(u64 hash) {
    hash = (hash ^ hash >> 33) * PRIME64_2;
    hash = (hash ^ hash >> 29) * PRIME64_3;
    return hash ^ hash >> 32;
}

DEVICE u64 rotated(u64 value, int bits) { return value << bits | value >> (64 - bits); }

DEVICE u64 bytes_swapped(u64 value) {
    u64 swapped = 0;
    for (int i = 0; i < 8; ++i) swapped |= (value >> (8 * i) & 0xFF) << (56 - 8 * i);
    return swapped;
}

// ------------------------------------------------------------------- up to 240 bytes, by one lane

RARE u64 word(u64 address) { return read64<1>(address); }

RARE u64 mix(u64 address, u32 offset) {
    return fold(word(address) ^ secret(offset), word(address + 8) ^ secret(offset + 8));
}

DEVICE u64 digest_to_16(u64 source, u64 size) {
    if (size > 8) {
        const u64 low = word(source) ^ secret(24) ^ secret(32);
        const u64 high = word(source + size - 8) ^ secret(40) ^ secret(48);
        return avalanche(size + bytes_swapped(low) + high + fold(low, high));
    }
    if (size >= 4) {
        u64 first = 0, last = 0;
        for (int i = 0; i < 4; ++i) {
            first |= u64(load<u8>(source + i)) << (8 * i);
            last |= u64(load<u8>(source + size - 4 + i)) << (8 * i);
        }
        u64 hash = (last + (first << 32)) ^ secret(8) ^ secret(16);
        hash ^= rotated(hash, 49) ^ rotated(hash, 24);
        hash *= 0x9FB21C651E98DF25;
        hash ^= (hash >> 35) + size;
        hash *= 0x9FB21C651E98DF25;
        return hash ^ hash >> 28;
    }
    if (size == 0) return avalanche_of_xxh64(secret(56) ^ secret(64));
    const u64 first = load<u8>(source), middle = load<u8>(source + size / 2);
    const u64 last = load<u8>(source + size - 1);
    const u64 key = (secret(0) ^ secret(4)) & 0xFFFFFFFF;
    return avalanche_of_xxh64((first << 16 | middle << 24 | last | size << 8) ^ key);
}

DEVICE u64 digest_to_128(u64 source, u64 size) {
    u64 hash = size * PRIME64_1;
#pragma unroll 1
    for (int i = int(size - 1) / 32; i >= 0; --i) {
        hash += mix(source + 16 * i, 32 * i);
        hash += mix(source + size - 16 * (i + 1), 32 * i + 16);
    }
    return avalanche(hash);
}

DEVICE u64 digest_to_240(u64 source, u64 size) {
    if (size <= 16) return digest_to_16(source, size);
    if (size <= 128) return digest_to_128(source, size);
    u64 hash = size * PRIME64_1;
#pragma unroll 1
    for (int i = 0; i < 8; ++i) hash += mix(source + 16 * i, 16 * i);
    hash = avalanche(hash);
#pragma unroll 1
    for (int i = 8; i < int(size / 16); ++i) hash += mix(source + 16 * i, 16 * (i - 8) + 3);
    return avalanche(hash + mix(source + size - 16, 119));
}

// ---------------------------------------------------------------------------------- copying

// Four reads are under way before the first write waits for one.
template <typename T>
DEVICE void copy_units(u64 source, u64 target, u64 size) {
    const u64 step = 32 * sizeof(T);
    EACH_LANE {
        u64 at = lane * sizeof(T);
        for (; at + 3 * step < size; at += 4 * step) {
            const T first = load<T>(source + at), second = load<T>(source + at + step);
            const T third = load<T>(source + at + 2 * step);
            const T fourth = load<T>(source + at + 3 * step);
            store<T>(target + at, first);
            store<T>(target + at + step, second);
            store<T>(target + at + 2 * step, third);
            store<T>(target + at + 3 * step, fourth);
        }
        for (; at < size; at += step) store<T>(target + at, load<T>(source + at));
    }
}

// Bytes by the widest unit that fits both addresses, then what is left of them.
DEVICE void copy(u64 source, u64 target, u64 size) {
    const u64 both = source | target;
    u64 done = 0;
    if (both % 16 == 0) {
        done = size / 16 * 16;
        copy_units<Pair>(source, target, done);
    } else if (both % 4 == 0) {
        done = size / 4 * 4;
        copy_units<u32>(source, target, done);
    } else if (both % 2 == 0) {
        done = size / 2 * 2;
        copy_units<u16>(source, target, done);
    }
    copy_units<u8>(source + done, target + done, size - done);
}

RARE void copy_some(u64 source, u64 target, u64 size) { copy(source, target, size); }

// ---------------------------------------------------------------- more than 240 bytes, by a warp

DEVICE void accumulate(Pair &sum, Pair data, Pair key) {
    const u64 first = data.first ^ key.first, second = data.second ^ key.second;
    sum.first += data.second + (first & 0xFFFFFFFF) * (first >> 32);
    sum.second += data.first + (second & 0xFFFFFFFF) * (second >> 32);
}

DEVICE u64 scrambled(u64 value, u64 key) { return (value ^ value >> 47 ^ key) * PRIME32_1; }

DEVICE Pair key_at(u32 offset) { return {secret(offset), secret(offset + 8)}; }

DEVICE Pair whole_key(int index) { return {SECRET[index], SECRET[index + 1]}; }

// What a lane holds of one row: its two accumulators and its parts of the secret.
struct Digesting {
    Pair sum, low_key, high_key, scramble_key;
};

DEVICE Digesting beginning(int lane) {
    const int which = lane % 4, stripe = lane / 4;
    Digesting own;
    const u64 start[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                          PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    own.sum = which == 0   ? Pair{start[0], start[1]}
              : which == 1 ? Pair{start[2], start[3]}
              : which == 2 ? Pair{start[4], start[5]}
                           : Pair{start[6], start[7]};
    own.low_key = whole_key(stripe + 2 * which);
    own.high_key = whole_key(stripe + 8 + 2 * which);
    own.scramble_key = whole_key(16 + 2 * which);
    return own;
}

// Add what each lane gathered to the accumulators of all.
DEVICE void add_partial(Lanes<Digesting> &state, Lanes<Pair> &partial) {
    Lanes<u64> first, second;
    EACH_LANE {
        first[lane] = partial[lane].first;
        second[lane] = partial[lane].second;
    }
    add_up<4, 16>(first);
    add_up<4, 16>(second);
    EACH_LANE {
        state[lane].sum.first += first[lane];
        state[lane].sum.second += second[lane];
    }
}

struct Halves {
    Pair low, high;
};

template <int UNIT>
DEVICE Halves read_block(u64 block, int lane) {
    return {read_pair<UNIT>(block + 16 * lane), read_pair<UNIT>(block + HALF_BLOCK + 16 * lane)};
}

// All blocks but the last, each with the scrambling that ends it. With STORES, the target is none or
// aligned to 16 bytes, and gets what was read for the digest. Byte by byte, code is large and one
// block in flight is many reads.
template <int UNIT, bool STORES>
DEVICE void digest_blocks(Lanes<Digesting> &state, u64 source, u64 target, u32 num_blocks) {
    constexpr u32 DEPTH = UNIT == 1 ? 1 : AHEAD;
    Lanes<Halves> ahead[DEPTH];
#pragma unroll
    for (u32 i = 0; i < DEPTH; ++i)
        if (i < num_blocks) EACH_LANE ahead[i][lane] = read_block<UNIT>(source + i * BLOCK, lane);
    for (u32 group = 0; group < num_blocks; group += DEPTH) {
#pragma unroll
        for (u32 i = 0; i < DEPTH; ++i) {
            const u32 number = group + i;
            if (number >= num_blocks) break;
            const u64 at = u64(number) * BLOCK;
            Lanes<Pair> partial;
            EACH_LANE {
                const Halves data = ahead[i][lane];
                if (STORES && target) {
                    store<Pair>(target + at + 16 * lane, data.low);
                    store<Pair>(target + at + HALF_BLOCK + 16 * lane, data.high);
                }
                partial[lane] = {0, 0};
                accumulate(partial[lane], data.low, state[lane].low_key);
                accumulate(partial[lane], data.high, state[lane].high_key);
                if (number + DEPTH < num_blocks)
                    ahead[i][lane] = read_block<UNIT>(source + at + DEPTH * BLOCK, lane);
            }
            if (!STORES && target) copy_some(source + at, target + at, BLOCK);
            add_partial(state, partial);
            EACH_LANE {
                Digesting &own = state[lane];
                own.sum.first = scrambled(own.sum.first, own.scramble_key.first);
                own.sum.second = scrambled(own.sum.second, own.scramble_key.second);
            }
        }
    }
}

// The last block, not scrambled: its whole stripes, and the last 64 bytes once more.
template <int UNIT>
DEVICE void digest_rest(Lanes<Digesting> &state, u64 rest, u64 end) {
    const u64 size = end - rest;
    const int num_stripes = int((size - 1) / STRIPE);
    Lanes<Pair> partial;
    EACH_LANE {
        const int stripe = lane / 4;
        const u64 at = rest + 16 * lane;
        partial[lane] = {0, 0};
        if (stripe < num_stripes)
            accumulate(partial[lane], read_pair<UNIT>(at), state[lane].low_key);
        if (stripe + 8 < num_stripes)
            accumulate(partial[lane], read_pair<UNIT>(at + HALF_BLOCK), state[lane].high_key);
        if (stripe == 7) // never busier than the others
            accumulate(partial[lane], read_pair<1>(end - STRIPE + 16 * (lane % 4)),
                       key_at(121 + 16 * (lane % 4)));
    }
    add_partial(state, partial);
}

template <int UNIT, bool STORES>
DEVICE Lanes<u64> digest_of_many(const Row row) {
    const u32 num_blocks = u32((row.size_bytes - 1) / BLOCK);
    const u64 done = u64(num_blocks) * BLOCK;
    Lanes<Digesting> state;
    EACH_LANE state[lane] = beginning(lane);
    digest_blocks<UNIT, STORES>(state, row.source, row.target, num_blocks);
    digest_rest<UNIT>(state, row.source + done, row.source + row.size_bytes);
    if (row.target) copy_some(row.source + done, row.target + done, row.size_bytes - done);
    Lanes<u64> digest;
    EACH_LANE {
        const Pair key = key_at(11 + 16 * (lane % 4)), sum = state[lane].sum;
        digest[lane] = fold(sum.first ^ key.first, sum.second ^ key.second);
    }
    add_up<1, 2>(digest);
    EACH_LANE digest[lane] = avalanche(digest[lane] + row.size_bytes * PRIME64_1);
    return digest;
}

RARE Lanes<u64> digest_of_few(const Row row) {
    Lanes<u64> digest;
    EACH_LANE digest[lane] = lane ? 0 : digest_to_240(row.source, row.size_bytes);
    if (row.target) copy_some(row.source, row.target, row.size_bytes);
    return digest;
}

RARE Lanes<u64> digest_and_copy(const Row row) { return digest_of_many<16, false>(row); }

RARE Lanes<u64> digest_by_words(const Row row) { return digest_of_many<4, false>(row); }

RARE Lanes<u64> digest_by_bytes(const Row row) { return digest_of_many<1, false>(row); }

// The digest of a row, in lane 0; on the way, its bytes go to its target if it has one.
DEVICE Lanes<u64> digest_of(const Row row) {
    if (row.size_bytes <= 240) return digest_of_few(row);
    if (row.source % 4) return digest_by_bytes(row);
    if (row.source % 16) return digest_by_words(row);
    return row.target % 16 ? digest_and_copy(row) : digest_of_many<16, true>(row);
}

DEVICE Row row_at(u64 rows, u64 number) {
    const u64 at = rows + number * sizeof(Row);
    return {load<u64>(at), load<u64>(at + 8), load<u64>(at + 16), load<u64>(at + 24)};
}

// --------------------------------------------------------------- kernels; parameters are 64 bits

// digests[row.index] = the digest of the row's source; the bytes go to its target, if not 0.
KERNEL mtckpt_digest_copy(u64 rows, u64 num_rows, u64 digests) {
    const u64 number = row_number();
    if (number >= num_rows) return;
    const Row row = row_at(rows, number);
    Lanes<u64> digest = digest_of(row);
    EACH_LANE if (lane == 0) store<u64>(digests + 8 * row.index, digest[lane]);
}

// The source of every row goes to its target.
KERNEL mtckpt_gather(u64 rows, u64 num_rows) {
    const u64 number = row_number();
    if (number >= num_rows) return;
    const Row row = row_at(rows, number);
    copy(row.source, row.target, row.size_bytes);
}

// bad[row.index] = 1 where the digest of the row's source is not digests[row.index]; else nothing.
KERNEL mtckpt_verify(u64 rows, u64 num_rows, u64 digests, u64 bad) {
    const u64 number = row_number();
    if (number >= num_rows) return;
    Row row = row_at(rows, number);
    row.target = 0;
    Lanes<u64> digest = digest_of(row);
    EACH_LANE
    if (lane == 0 && digest[lane] != load<u64>(digests + 8 * row.index))
        store<u8>(bad + row.index, 1);
}

// The source of every row goes to its target, if not 0, where its digest is digests[row.index];
// else bad[row.index] = 1, and nothing is written to the target.
KERNEL mtckpt_place(u64 rows, u64 num_rows, u64 digests, u64 bad) {
    const u64 number = row_number();
    if (number >= num_rows) return;
    Row row = row_at(rows, number);
    const u64 target = row.target;
    row.target = 0;
    Lanes<u64> digest = digest_of(row);
    const bool is_sound = of_first_lane(digest) == load<u64>(digests + 8 * row.index);
    if (is_sound) {
        if (target) copy(row.source, target, row.size_bytes);
    } else {
        EACH_LANE if (lane == 0) store<u8>(bad + row.index, 1);
    }
}
