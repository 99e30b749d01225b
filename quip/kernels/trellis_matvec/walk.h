// The states of the rows of a packed matrix, and where its columns are.
//
// In tiles of one step a row each column is a shift register of the last codes: it goes down the
// rows, whose bytes are read as they are packed. In wider tiles a row of a tile is one, and the
// states of whole rows are written down.

#pragma once

#include <algorithm>
#include <vector>

#include "../lanes.h"
#include "../threads.h"
#include "../unpack.h"

namespace {

constexpr int STEPS = 2 * LANES, HELD = 2 * STEPS;  // of a vector of states; of a block of two
constexpr int PIECE_COLUMNS = 16;  // of a place where a block has its last bits in bytes
constexpr int GROUP = 32;                           // rows that a block goes down at once

typedef uint16_t Shorts __attribute__((vector_size(2 * STEPS)));

enum Kind : int32_t { TABLE, MUL1, MCG, THREE_INST, ONE_MAD, INT8 };  // as in cpu.py

struct TrellisMatvec {  // as in cpu.py
    int64_t m, steps, tokens, row_bytes, group;  // steps of a row; columns that share a scale
    int64_t tiles, across;                       // one below the other; steps of a row of one
    const uint8_t *words;                        // [m, row_bytes]
    const float *x, *scales;                     // [tokens, steps * width], [groups]
    const float *table;                          // [2^state_bits, width]
    const uint16_t *halves;                      // the same numbers; null: they are no halves
    const uint16_t *pairs;                       // of them, as in cpu.py; null: none
    const uint16_t *circuits;
    void *out;                                   // y [tokens, m], or W~ [m, steps * width]
    int32_t bits, state_bits, width;
    Kind kind;
    Threads threads;

    int64_t tile_start(int64_t i) const { return i * (m / tiles) + std::min(i, m % tiles); }
    int64_t tile_of(int64_t row) const {
        const int64_t size = m / tiles, more = m % tiles, longer = more * (size + 1);
        return row < longer ? row / (size + 1) : more + (row - longer) / size;
    }
    bool packed() const { return across == 1 && !(bits & (bits - 1)); }  // bytes of one plane do
};

inline Shorts shorts(const uint16_t *from) {
    Shorts to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

// STEPS bytes
inline Shorts shorts(const uint8_t *from) {
#if defined(__AVX512BW__)
    return (Shorts)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (Shorts)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from));
#else
    Shorts to;
    for (int i = 0; i < STEPS; i++) to[i] = from[i];
    return to;
#endif
}

// The states after codes of `bits` bits in each byte, which `up` brings to the top of 16
inline Shorts after(Shorts states, Shorts bytes, int up, int bits) {
#ifdef __AVX512VBMI2__
    const __m512i top = _mm512_sll_epi16((__m512i)bytes, _mm_cvtsi32_si128(up));
    return (Shorts)_mm512_shldv_epi16((__m512i)states, top, _mm512_set1_epi16(bits));
#else
    return states << bits | bytes << up >> (16 - bits);
#endif
}

// Some neighbouring columns: their codes are in the same bits of the bytes at `byte`
struct Place {
    int64_t byte, first, count;
    int up;
};

// The last bits of the columns of two places, as numbers of 16 bits
struct Register {
    static constexpr int COLUMNS = STEPS;  // of a place
    Shorts states[2] = {};
    void take(const uint8_t *row, const Place *places, int bits) {
        for (int i = 0; i < 2; i++)
            states[i] = after(states[i], shorts(row + places[i].byte), places[i].up, bits);
    }
};

// All places of a row, of `columns` at most; as many as blocks of HELD columns have room for. Small
// ones are neighbours in a block, but for those of the last bytes
inline std::vector<Place> places(const TrellisMatvec &a, int columns) {
    std::vector<Place> all;
    const int fields = a.packed() ? 8 / a.bits : 1;
    const int64_t size = divide_up(a.steps, fields);
    const int64_t whole = columns < STEPS ? size / HELD * HELD : 0;
    const auto put = [&](int64_t byte, int f) {
        const int64_t first = f * size + byte;
        const int64_t count = std::min({int64_t(columns), size - byte, a.steps - first});
        if (count > 0 || byte < whole)
            all.push_back({byte, first, std::max<int64_t>(count, 0), 16 - (f + 1) * a.bits});
    };
    for (int64_t start = 0; start < whole; start += HELD)
        for (int f = 0; f < fields; f++)
            for (int64_t byte = start; byte < start + HELD; byte += columns) put(byte, f);
    for (int64_t byte = whole; byte < size; byte += columns)
        for (int f = 0; f < fields; f++) put(byte, f);
    while (all.size() * columns % HELD) all.push_back({0, 0, 0, 16 - a.bits});
    return all;
}

// Goes down the rows first ... stop - 1 of a matrix, GROUP at once at most
template <class Register> class Walk {
  public:
    Walk(const TrellisMatvec &a, const std::vector<Place> &all, int64_t first, int64_t stop)
        : a(a), all(all), registers(all.size() * Register::COLUMNS / HELD), next(first), stop(stop),
          padded(divide_up(a.steps, HELD) * HELD), stride(padded + sizeof(Words)),
          copies(GROUP * stride),
          written(a.across > 1 ? (GROUP + 1) * stride : 0) {}

    int64_t row;  // of the group
    int rows;

    // Whether there is another group
    bool go() {
        if (next >= stop) return false;
        const int64_t tile = a.tile_of(next), start = a.tile_start(tile);
        const int64_t end = a.tile_start(tile + 1);
        if (next == start || !begun) begin(start, end - start);
        row = next, rows = std::min({int64_t(GROUP), stop - next, end - next});
        read(row, rows);
        next += rows;
        return true;
    }

    uint16_t *states(int i) { return written.data() + (i + 1) * stride; }

    const TrellisMatvec &a;
    const std::vector<Place> &all;
    const uint8_t *at[GROUP + 1];  // the bytes of the rows
    std::vector<Register> registers;

  private:

    // Reads as many rows above the next one, in the circle of its tile, as a state remembers
    void begin(int64_t start, int64_t size) {
        begun = true;
        std::fill(registers.begin(), registers.end(), Register{});
        std::fill_n(written.begin(), a.across > 1 ? padded : 0, 0);
        for (int64_t i = divide_up(a.state_bits, a.bits * a.across); i > 0; i--) {
            const int64_t back = (next - start - i) % size;
            read(start + back + (back < 0 ? size : 0), 1);
            for (size_t b = 0; b < registers.size() && a.across == 1; b++)
                registers[b].take(at[0], &all[b * (HELD / Register::COLUMNS)], a.bits);
        }
    }

    // Points to the bytes of `count` rows from `first` on, or writes down their codes
    void read(int64_t first, int count) {
        for (int i = 0; i < count; i++) {
            const int64_t r = first + i;
            uint8_t *copy = copies.data() + i * stride;
            at[i] = a.packed() ? a.words + r * a.row_bytes : copy;
            if (a.packed() && (a.m - r) * a.row_bytes < padded)  // vectors reach beyond it
                at[i] = copy, std::copy_n(a.words + r * a.row_bytes, a.row_bytes, copy);
        }
        at[count] = at[count - 1];
        if (a.packed()) return;
        int64_t start = 0;
        int low = 0;  // plane by plane: the next one finds bytes that have reached the cache
        for (int width : {8, 4, 2, 1}) {
            if (!(a.bits & width)) continue;
            for (int i = 0; i < count; i++)
                unpack_plane(a.words + (first + i) * a.row_bytes + start, width, low, a.steps,
                             copies.data() + i * stride);
            start += divide_up(a.steps * width, 8), low += width;
        }
        if (a.across == 1) return;
        for (int i = 0; i < count; i++) write_states(at[i], states(i - 1), states(i));
        std::copy_n(states(count - 1), padded, states(-1));
    }

    void write_states(const uint8_t *codes, const uint16_t *from, uint16_t *to) {
        const uint32_t mask = (1u << a.state_bits) - 1;
        for (int64_t j = 0; j < a.steps;) {
            const int64_t stop = j + a.across;
            for (uint32_t state = from[stop - 1]; j < stop; j++)
                to[j] = state = (state << a.bits | codes[j]) & mask;
        }
    }

    int64_t next, stop, padded, stride;  // no power of 2: such rows would evict each other
    bool begun = false;
    std::vector<uint8_t> copies;
    std::vector<uint16_t> written;
};

// Block b from the top row of the group on
class Block {
  public:
    Block(Walk<Register> &walk, int64_t b)
        : walk(walk), kept(walk.registers[b]), one(walk.all[2 * b]), two(walk.all[2 * b + 1]),
          low(kept.states[0]), high(kept.states[1]), bits(walk.a.bits), down(walk.a.across == 1) {}
    ~Block() { kept.states[0] = low, kept.states[1] = high; }

    // The states of row i, with older bits above them; anything for the row after the last one
    [[gnu::always_inline]] void go(int i, Shorts &to_low, Shorts &to_high) {
        if (down) {
            const Shorts bytes = shorts(walk.at[i] + one.byte);
            const bool same = one.byte == two.byte;
            low = after(low, bytes, one.up, bits);
            high = after(high, same ? bytes : shorts(walk.at[i] + two.byte), two.up, bits);
        } else {
            low = shorts(walk.states(i) + one.first);
            high = shorts(walk.states(i) + two.first);
        }
        to_low = low, to_high = high;
    }

  private:
    Walk<Register> &walk;
    Register &kept;
    const Place one, two;
    Shorts low, high;
    const int bits;
    const bool down;
};

}  // namespace
