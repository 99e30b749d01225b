// Learned centroids: the fast forms of reference.py, for vectors of 1, 2 or 4 weights.

#include "lloyd.h"
#include "panel.h"

namespace {

template <template <int, template <int> class> class Work, class Given, class Call>
void with(const Given &given, int64_t unit, Call call) {
    const bool shared = fills({given.m, given.groups}, given.dim, unit);
    if (given.dim == 1) call(Work<1, Lanes>(given));
    if (given.dim == 2) shared ? call(Work<2, Shared>(given)) : call(Work<2, Lanes>(given));
    if (given.dim == 4) shared ? call(Work<4, Shared>(given)) : call(Work<4, Lanes>(given));
}

}  // namespace

extern "C" void assign(const Problem *p) {
    with<Quantizer>(*p, LANES, [](auto quantizer) { quantizer.assign(); });
}

extern "C" void improve(const Problem *p) {
    with<Quantizer>(*p, LANES, [](auto quantizer) { quantizer.improve(); });
}

extern "C" void round_columns(const Panel *p) {
    with<Rounder>(*p, ROWS, [](auto rounder) { rounder.round(); });
}
