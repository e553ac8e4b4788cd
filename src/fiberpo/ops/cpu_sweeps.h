// The order of things: which sweeps a call needs, and what happens over the contexts in between.
#pragma once

#include <sys/mman.h>

namespace {

constexpr int64_t CHUNK = 4096;  // tokens of a chunk, about; fixed, so that sums are too
constexpr int64_t WORTH = 32768;  // tokens for which waking a thread pays: about 40 us of work

// Calls `row(segment)` for every segment, chunks in parallel.
template <class Rows> void sweep(const Plan &plan, const Call &call, int64_t threads, Rows rows) {
    const int64_t size = std::max(CHUNK, call.tokens / (Pool::MOST_CHUNKS - 1) + 1);
    const int64_t *starts = plan.starts, *end = starts + plan.segments;
    auto chunk = [&](int64_t i) {
        const int64_t *from = std::lower_bound(starts, end, i * size);
        const int64_t *to = std::lower_bound(from, end, (i + 1) * size);
        for (int64_t s = from - starts; s < to - starts; s++)
            rows(s);
    };
    if (threads < 2 || call.tokens < 2 * WORTH) {
        for (int64_t s = 0; s < plan.segments; s++)
            rows(s);
        return;
    }
    Pool::here().run((call.tokens + size - 1) / size, threads,
                     [](void *job, int64_t i) { (*(decltype(chunk) *)job)(i); }, &chunk);
}

// A gradient that the allocator has just fetched costs one fault a page, more than its computation.
inline void large_pages(void *memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21, begin = ((uintptr_t)memory + page - 1) & ~(page - 1);
    const uintptr_t end = ((uintptr_t)memory + bytes) & ~(page - 1);
    if (bytes > 16 * (int64_t)page && end > begin)
        madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}

template <class T, int CHART> struct Evaluation {
    using Slow = Careful<T, CHART>;
    using Fast = Swift<CHART == SIGNED_LOG ? 2 : 1>;
    static constexpr int CH = Slow::CHANNELS;
    const Plan &plan;
    const Call &call;
    const int64_t C = plan.contexts, S = plan.segments;
    const bool swift = sizeof(T) == 4 && Fast::serves(plan, call);
    // GSPO: nothing of a token but its weight, the gradient is one number a row
    const bool level = CHART == LOG && plan.token == ZERO && plan.first == PASS &&
                       plan.has_contexts && !plan.pessimistic && !plan.detached &&
                       !call.token_advantages && !call.token_scale;
    const bool stops = plan.token == STOP;  // then the first sweep guesses that no context stops
    double *base = call.work, *slope = base + CH * C, *pull = slope + CH * C,
           *row_sums = pull + CH * C, *row_a = row_sums + CH * S;

    Evaluation(const Plan &plan, const Call &call) : plan(plan), call(call) {}

    Above above(int64_t leaf) const {
        Above at;
        for (int k = 0; leaf >= 0 && k < CH; k++)
            at.mean[k] = call.mean[k * C + leaf], at.base[k] = base[k * C + leaf];
        return at;
    }

    // Gates of one context; its parent is done.
    void descend(int64_t c, int64_t stratum) const {
        const int64_t code = plan.codes[stratum], up = plan.parent[c];
        const double aggregate[3] = {plan.budget[c], plan.budget[C + c], plan.slope[c]};
        const double *numbers = code == AGGREGATE ? aggregate
                                : code == TAPER   ? plan.count + c
                                                  : plan.numbers + 4 * stratum;
        for (int k = 0; k < CH; k++) {
            double *mean = call.mean + k * C, *h = base + k * C;
            if (code == STOP) {
                h[c] = (mean[c] > aggregate[k]) + (up < 0 ? 0.0 : h[up]), slope[k * C + c] = 0;
                continue;
            }
            vd v, s, x = splat(mean[c] - (up < 0 ? 0.0 : mean[up]));
            gate(code, numbers, CH == 2 ? k : -1, x, splat(plan.sign[c]), v, s);
            h[c] = v[0] + (up < 0 ? 0.0 : h[up]), slope[k * C + c] = s[0];
        }
    }

    Adjoint tokens(int64_t s, const Above &at, bool alone) const {
        if (stops)
            return Slow(plan, call, s).template stop<false>(at);
        if (level) {
            Slow row(plan, call, s);
            Adjoint found;
            const double w = call.scale[s] * row.advantage();
            found.a = w == 0 ? 0 : w * std::exp(at.base[0]) * (double)row.tokens;
            found.value = found.a;
            return found;
        }
        if constexpr (sizeof(T) == 4 && CHART != DEVIATION)
            if (swift) {
                Fast row(plan, call, s);
                return alone || CH == 1 ? row.template go<false>(at) : row.template go<true>(at);
            }
        return Slow(plan, call, s).go(at);
    }

    void finish(int64_t s, const double *adjoint, const Above &at, bool alone) const {
        double pulled[2];
        for (int k = 0; k < CH; k++)
            pulled[k] = adjoint[k] == 0 ? 0 : plan.omega[s] * adjoint[k];
        Slow row(plan, call, s);
        if (level)
            return (void)std::fill_n(row.out, row.tokens, (T)-pulled[0]);
        const bool nothing = pulled[0] == 0 && (CH == 1 || pulled[1] == 0) && !plan.states;
        if constexpr (sizeof(T) == 4 && CHART != DEVIATION)
            if (swift) {
                const bool kept = !alone && CH == 2;
                if (kept || !nothing)
                    Fast(plan, call, s).finish(pulled, kept);
                return;
            }
        if (!nothing)
            row.finish(pulled, at);
    }

    // Every row a context of its own, under nothing.
    void alone() const {
        sweep(plan, call, call.threads, [&](int64_t s) {
            Slow row(plan, call, s);
            double sums[2], adjoint[2];
            row.measure(sums);
            for (int k = 0; k < CH; k++)
                call.mean[k * C + s] = plan.omega[s] * sums[k] / plan.mass[s];
            descend(s, 0);
            const Above at = above(s);
            const Adjoint found = tokens(s, at, true);
            call.segment_values[s] = found.value;
            for (int k = 0; k < CH; k++) {
                double a = k ? -found.a : found.a, g = slope[k * C + s];
                adjoint[k] = ((a == 0 ? 0 : a * g) - found.t[k]) / plan.mass[s];
            }
            if (!plan.detached)
                finish(s, adjoint, at, true);
        });
    }

    void measure() const {
        sweep(plan, call, call.threads, [&](int64_t s) {
            double sums[2];
            Slow row(plan, call, s);
            if (stops)
                call.segment_values[s] = row.template stop<true>(Above(), sums).value;
            else
                row.measure(sums);
            for (int k = 0; k < CH; k++)
                row_sums[k * S + s] = plan.omega[s] * sums[k];
        });
        std::fill_n(call.mean, CH * C, 0.0);
        for (int k = 0; k < CH; k++) {
            double *sum = call.mean + k * C;
            for (int64_t s = 0; s < S; s++)
                sum[plan.leaf[s]] += row_sums[k * S + s];
            for (int64_t c = C - 1; c >= 0; c--)
                if (plan.parent[c] >= 0)
                    sum[plan.parent[c]] += sum[c];
        }
    }

    void descend() const {
        for (int64_t i = 0; i < CH * C; i++)
            call.mean[i] /= plan.mass[i % C];
        for (int64_t k = 0; k < plan.strata; k++)
            for (int64_t c = plan.bounds[k]; c < plan.bounds[k + 1]; c++)
                descend(c, k);
    }

    void totals() const {
        std::fill_n(call.totals, CH * plan.states, 0.0);
        std::fill_n(call.shared, CH * plan.states, 0.0);
        sweep(plan, call, 1, [&](int64_t s) {
            Slow row(plan, call, s);
            row.states(above(row.leaf));
        });
    }

    // The rows that have a context out of budget on a side that some of their tokens may be on.
    void stop() const {
        sweep(plan, call, call.threads, [&](int64_t s) {
            Slow row(plan, call, s);
            const Above at = above(row.leaf);
            const double A = call.token_advantages ? 0 : row.advantage();
            if ((A >= 0 && at.base[0] > 0) || (A <= 0 && at.base[CH - 1] > 0))
                call.segment_values[s] = row.template stop<false>(at).value;
        });
    }

    void adjoin() const {
        if (stops && plan.has_contexts)
            return stop();
        // states are shared by rows: one thread keeps the order of their sums
        sweep(plan, call, plan.states ? 1 : call.threads, [&](int64_t s) {
            const Adjoint found = tokens(s, above(Slow(plan, call, s).leaf), !plan.has_contexts);
            call.segment_values[s] = found.value;
            if (!plan.has_contexts)
                return;
            row_a[s] = found.a;
            for (int k = 0; k < CH; k++)
                row_sums[k * S + s] = found.t[k];
        });
        if (!plan.has_contexts || plan.detached)
            return;
        std::fill_n(pull, C, 0.0);
        double *below = pull;  // adjoints of everything below
        for (int64_t s = 0; s < S; s++)
            below[plan.leaf[s]] += row_a[s];
        for (int64_t c = C - 1; c >= 0; c--)
            if (plan.parent[c] >= 0)
                below[plan.parent[c]] += below[c];
        for (int k = 0; k < CH; k++) {
            double *D = call.adjoint + k * C;
            for (int64_t c = 0; c < C; c++) {
                const double own = below[c] == 0 ? 0 : (k ? -below[c] : below[c]) * slope[k * C + c];
                D[c] = own;
                if (plan.parent[c] >= 0)
                    D[plan.parent[c]] -= own;
            }
            for (int64_t s = 0; s < S; s++)
                D[plan.leaf[s]] -= row_sums[k * S + s];
        }
    }

    void finish() const {
        if (plan.detached || (!plan.has_contexts && !plan.states))
            return;
        for (int64_t c = 0; c < C; c++)
            for (int k = 0; k < CH; k++) {
                const double over = plan.parent[c] < 0 ? 0 : pull[k * C + plan.parent[c]];
                pull[k * C + c] = call.adjoint[k * C + c] / plan.mass[c] + over;
            }
        sweep(plan, call, call.threads, [&](int64_t s) {
            const int64_t leaf = Slow(plan, call, s).leaf;
            double adjoint[2] = {0, 0};
            for (int k = 0; leaf >= 0 && k < CH; k++)
                adjoint[k] = pull[k * C + leaf];
            finish(s, adjoint, above(leaf), false);
        });
    }

    // Parts 0 to 4; between them the caller may merge mean, totals, and adjoint with shared.
    void run() const {
        if (call.begin == 0)
            large_pages(call.gradient, call.tokens * (int64_t)sizeof(T));
        const bool whole = call.begin == 0 && call.end == 4 && !plan.states;
        if (whole && plan.has_contexts && plan.row_leaf && plan.strata == 1) {
            alone();
        } else {
            for (int64_t part = call.begin; part < call.end; part++) {
                if (part == 0 && plan.has_contexts)
                    measure();
                if (part == 1 && plan.has_contexts)
                    descend();
                if (part == 1 && plan.states)
                    totals();
                if (part == 2)
                    adjoin();
                if (part == 3)
                    finish();
            }
        }
        if (call.end == 4) {
            double value = 0;
            for (int64_t s = 0; s < S; s++)
                value += call.segment_values[s];
            *call.value = value;
        }
    }
};

template <class T> void evaluate(const Plan &plan, const Call &call) {
    if (plan.chart == LOG)
        Evaluation<T, LOG>(plan, call).run();
    else if (plan.chart == SIGNED_LOG)
        Evaluation<T, SIGNED_LOG>(plan, call).run();
    else
        Evaluation<T, DEVIATION>(plan, call).run();
}

}  // namespace

extern "C" void fiberpo_evaluate(const Plan *plan, const Call *call) {
    if (call->wide)
        evaluate<double>(*plan, *call);
    else
        evaluate<float>(*plan, *call);
}

// The least that must move: two inputs read, one output written.
extern "C" void fiberpo_floor(const float *a, const float *b, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        out[i] = a[i] - b[i];
}
