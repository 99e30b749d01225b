// Work that the threads of torch's own pool share; threads.py says where that is entered.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

struct Threads {  // as in threads.py
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel; null: none
    int64_t count;
};

// work(first, last) for 0 ... count, cut into pieces of `size`; what it writes must not overlap
template <class Work>
void share(const Threads &threads, int64_t count, int64_t size, const Work &work) {
    struct Pieces {
        const Work &work;
        int64_t count, size;
        std::atomic<int64_t> next;
    } pieces{work, count, size, {0}};
    void (*const take)(void *) = [](void *given) {
        auto &all = *static_cast<Pieces *>(given);
        for (int64_t first; (first = all.next.fetch_add(all.size)) < all.count;)
            all.work(first, std::min(first + all.size, all.count));
    };
    if (threads.parallel && threads.count > 1 && count > size)
        threads.parallel(take, &pieces, unsigned(threads.count), 0);
    else
        take(&pieces);
}

}  // namespace
