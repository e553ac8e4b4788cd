// Evaluates gate plans on the CPU; what is computed is said in plan.py, the names are those there.
//
// Rows (segments) are independent but for sums per context, so that all work is sweeps over rows:
//   measure: sums of drifts           -> up the forest -> aggregates, context gates (descend)
//   tokens:  J, own gradients, sums of adjoints -> up  -> adjoint of every aggregate
//   finish:  what the aggregates add to the gradient
// Where every row is a context of its own and nothing stands above, the three follow each other
// row by row, in cache. Sums are taken in float64 and in an order that does not depend on threads.
// float32 log-probs with a clip (or nothing) at the token take a float32 path: log ratios are
// differences in float32 (exact where the two log-probs are within a factor of two, else rounded to
// nearest), compared with bounds rounded inwards. A token within half a unit in the last place of
// a bound can fall on its other side than in float64.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu_lanes.h"
#include "cpu_pool.h"

namespace {

enum Chart { LOG, SIGNED_LOG, DEVIATION };
enum Code { PASS, ZERO, CLIP, AGGREGATE, SOFT, QUADRATIC, ROLLBACK, TAPER, BUDGET, STOP };
const double INF = std::numeric_limits<double>::infinity();

extern "C" struct Plan {
    int64_t segments, contexts, strata, states, chart, token, first, pessimistic, detached,
        has_contexts, row_leaf;
    double token_numbers[4], first_numbers[4];
    const int64_t *starts, *leaf, *parent, *bounds, *codes, *state;
    const double *omega, *numbers, *mass, *count, *budget, *slope, *sign, *multiplicity;
};

extern "C" struct Call {
    int64_t tokens, wide, wide_advantages, token_advantages, token_scale, threads, begin, end;
    const void *log_probs, *old_log_probs, *advantages;
    const double *scale;
    void *gradient;
    double *value, *segment_values, *mean, *adjoint, *work, *totals, *shared;
};

// Value and slope of a gate; `channel` is -1 where there is one channel only.
FIBERPO_INLINE void gate_as(int64_t code, const double *n, int channel, vd x, vd A, vd &v, vd &s) {
    const vd zero = splat(0.0), one = splat(1.0);
    switch (code) {
    case PASS:
        v = x, s = one;
        break;
    case ZERO:
        v = s = zero;
        break;
    case CLIP: {
        md minus = lt(A, zero);
        v = least(sel(minus, splat(n[1]), splat(n[3])),
                  most(sel(minus, splat(n[0]), splat(n[2])), x));
        s = sel(eq(v, x), one, zero);
        break;
    }
    case AGGREGATE: {  // budget+, budget-, k
        vd k = splat(n[2]), C = channel < 0 ? sel(lt(x, zero), splat(n[1]), splat(n[0]))
                                            : splat(n[channel]);
        vd size = absolute(x), turn = (k + one) * C;
        md pass = le(size, C), roll = lt(size, (one + one / k) * C);
        v = sel(pass, x, sel(roll, sel(lt(x, zero), -turn, turn) - k * x, zero));
        s = sel(pass, one, sel(roll, -k, zero));
        break;
    }
    case SOFT: {
        vd tau = sel(lt(zero, A), splat(n[0]), splat(n[1])), z = tau * x;
        vd e = exponential(-absolute(z)), up = one / (one + e), down = e / (one + e);
        vd high = sel(lt(z, zero), down, up);
        v = sel(eq(z, z), splat(4.0) / tau * high - one, z);
        s = sel(eq(z, z), splat(4.0) * up * down, z);
        break;
    }
    case QUADRATIC: {
        md flat = eq(A, zero);
        vd bend = sel(lt(A, zero), splat(-1 / n[0]), splat(1 / n[0]));
        vd bent = sel(flat, zero, bend * x);
        v = x * (one - splat(0.5) * bent), s = one - bent;
        break;
    }
    case ROLLBACK: {
        md minus = lt(A, zero);
        vd turn = splat((1 + n[1]) * n[0]), alpha = splat(n[1]);
        md beyond = (minus & lt(x, splat(-n[0]))) | (no(minus) & lt(splat(n[0]), x));
        v = sel(beyond, sel(minus, -turn, turn) - alpha * x, x);
        s = sel(beyond, -alpha, one);
        break;
    }
    case TAPER: {  // count
        md pass = lt(A, zero) & le(x, zero);
        v = sel(pass, splat(n[0]) * x, zero), s = sel(pass, splat(n[0]), zero);
        break;
    }
    }
}

void gate(int64_t code, const double *n, int channel, vd x, vd A, vd &v, vd &s) {
    gate_as(code, n, channel, x, A, v, s);
}

// Adjoints summed over a row: in channel 0 (channel 1 has the negative), and behind the token gate.
struct Adjoint {
    double value = 0, a = 0, t[2] = {0, 0};
};

// What a row knows of its contexts.
struct Above {
    double mean[2] = {0, 0}, base[2] = {0, 0};
};

template <class T> struct Row {
    const Plan &plan;
    const Call &call;
    int64_t segment, begin, tokens, leaf;
    const T *p, *q;
    T *out;

    Row(const Plan &plan, const Call &call, int64_t s)
        : plan(plan), call(call), segment(s), begin(plan.starts[s]),
          tokens(plan.starts[s + 1] - begin),
          leaf(!plan.has_contexts ? -1
               : plan.row_leaf    ? plan.bounds[plan.strata - 1] + s
                                  : plan.leaf[s]),
          p((const T *)call.log_probs + begin), q((const T *)call.old_log_probs + begin),
          out((T *)call.gradient + begin) {}

    FIBERPO_INLINE vd ratio(int64_t i) const {
        return load(p + i, tokens - i) - load(q + i, tokens - i);
    }
    double advantage() const { return one_advantage(segment); }
    double one_advantage(int64_t i) const {
        return call.wide_advantages ? ((const double *)call.advantages)[i]
                                    : (double)((const float *)call.advantages)[i];
    }
    vd advantages(int64_t i) const {
        if (!call.token_advantages)
            return splat(advantage());
        if (call.wide_advantages)
            return load((const double *)call.advantages + begin + i, tokens - i);
        return load((const float *)call.advantages + begin + i, tokens - i);
    }
    vd scales(int64_t i) const {
        if (!call.token_scale)
            return splat(call.scale[segment]);
        return load(call.scale + begin + i, tokens - i);
    }
    vd of_states(const double *values, int64_t i) const {
        vd found = splat(0.0);
        for (int64_t j = 0; j < std::min<int64_t>(D, tokens - i); j++)
            found[j] = values[plan.state[begin + i + j]];
        return found;
    }
    void to_states(double *sums, vd values, int64_t i) const {
        for (int64_t j = 0; j < std::min<int64_t>(D, tokens - i); j++)
            sums[plan.state[begin + i + j]] += values[j];
    }
};

// Every plan, in float64 lanes.
template <class T, int CHART> struct Careful : Row<T> {
    using Row<T>::Row;
    using Row<T>::plan;
    using Row<T>::call;
    using Row<T>::tokens;
    using Row<T>::out;
    static constexpr int CHANNELS = CHART == SIGNED_LOG ? 2 : 1;
    static constexpr int CHANNEL = CHART == SIGNED_LOG ? 0 : -1;

    // Drifts after the first gate, and their slopes in the log ratio.
    template <bool FIRST> FIBERPO_INLINE void enter(vd l, int64_t i, vd *x, vd *inward) const {
        const vd zero = splat(0.0), one = splat(1.0);
        if (CHART == SIGNED_LOG) {
            x[0] = most(l, zero), x[1] = x[0] - l;
            inward[0] = sel(le(zero, l), one, zero), inward[1] = inward[0] - one;
        } else if (CHART == DEVIATION) {
            inward[0] = exponential(l), x[0] = inward[0] - one;
        } else {
            x[0] = l, inward[0] = one;
        }
        if (FIRST)
            for (int k = 0; k < CHANNELS; k++) {
                vd v, s;
                gate(plan.first, plan.first_numbers, CHANNEL < 0 ? -1 : k, x[k],
                     this->advantages(i), v, s);
                x[k] = v, inward[k] = sel(eq(s, zero), zero, inward[k] * s);
            }
    }

    // Sums of the drifts of a row.
    template <bool FIRST> void measure_as(double *sums) const {
        vd sum[2] = {splat(0.0), splat(0.0)};
        auto step = [&](vd l, int64_t i, md keep, bool whole) FIBERPO_STEP {
            vd x[2], inward[2];
            enter<FIRST>(l, i, x, inward);
            // without another gate, l in place of its negative part
            sum[0] += whole ? x[0] : sel(keep, x[0], splat(0.0));
            if (CHANNELS == 2) {
                x[1] = FIRST ? x[1] : l;
                sum[1] += whole ? x[1] : sel(keep, x[1], splat(0.0));
            }
        };
        int64_t i = 0;
        for (; i + D <= tokens; i += D)
            step(load(this->p + i, D) - load(this->q + i, D), i, md{}, true);
        if (i < tokens)
            step(this->ratio(i), i, head(vd{}, tokens - i), false);
        sums[0] = total(sum[0]);
        if (CHANNELS == 2)
            sums[1] = FIRST ? total(sum[1]) : sums[0] - total(sum[1]);
    }
    void measure(double *sums) const {
        plan.first == PASS ? measure_as<false>(sums) : measure_as<true>(sums);
    }

    FIBERPO_INLINE void enter(vd l, int64_t i, vd *x, vd *inward) const {
        plan.first == PASS ? enter<false>(l, i, x, inward) : enter<true>(l, i, x, inward);
    }

    void states(const Above &at) const {
        vd x[2], inward[2];
        for (int64_t i = 0; i < tokens; i += D) {
            enter(this->ratio(i), i, x, inward);
            for (int k = 0; k < CHANNELS; k++)
                this->to_states(call.totals + k * plan.states,
                                absolute(x[k] - splat(at.mean[k])), i);
        }
    }

    // BUDGET: value, slope, and slope in the total of the state.
    inline void budget(int k, int64_t i, vd u, vd &v, vd &s, vd &shared) const {
        const vd zero = splat(0.0);
        vd size = absolute(u), bound = splat(plan.token_numbers[0]);
        if (plan.states)
            bound = this->of_states(plan.multiplicity, i) * bound -
                    (this->of_states(call.totals + k * plan.states, i) - size);
        md spent = le(bound, zero), pass = no(spent) & le(size, bound);
        vd sign = sel(lt(u, zero), splat(-1.0), sel(lt(zero, u), splat(1.0), zero));
        v = sel(pass, u, sel(spent, zero, sign * bound));
        s = sel(spent, zero, splat(1.0));
        shared = sel(pass | spent, zero, -sign);
    }

    // STOP: what goes outward is taken out where a context above, or the token itself, is beyond.
    // MEASURE: the sums of the drifts of the row as well.
    template <bool MEASURE> Adjoint stop(const Above &at, double *sums = nullptr) const {
        const vd zero = splat(0.0);
        vd value = zero, above = zero, all = zero, limit[2];  // where A > 0, elsewhere
        for (int k = 0; k < 2; k++)
            limit[k] = splat(at.base[CHANNELS == 2 ? k : 0] > 0 ? 0.0 : plan.token_numbers[k]);
        for (int64_t i = 0; i < tokens; i += D) {
            const vd A = this->advantages(i), l = this->ratio(i);
            const md up = lt(zero, A), here = head(vd{}, tokens - i);
            const vd w = sel(here, this->scales(i) * A, zero);
            if (MEASURE)
                above += sel(here, most(l, zero), zero), all += sel(here, l, zero);
            const md kept = lt(sel(up, l, -l), sel(up, limit[0], limit[1]));
            const vd term = sel(kept, w, zero);
            value += sel(eq(term, zero), zero, term * load(this->p + i, tokens - i));
            store(out + i, -term, tokens - i);
        }
        Adjoint found;
        found.value = total(value);
        if (MEASURE)
            sums[0] = total(above), sums[CHANNELS - 1] = sums[0] - total(all);
        return found;
    }

    Adjoint go(const Above &at) const {
        const bool clip = plan.token == CLIP && plan.first == PASS && !plan.pessimistic;
        return clip ? go_as<true>(at) : go_as<false>(at);
    }

    template <bool CLIPPED> Adjoint go_as(const Above &at) const {
        const vd zero = splat(0.0);
        vd value = zero, sum_a = zero, sum_t[2] = {zero, zero};
        for (int64_t i = 0; i < tokens; i += D) {
            vd A = this->advantages(i), w = sel(head(vd{}, tokens - i), this->scales(i) * A, zero);
            vd l = this->ratio(i), x[2], inward[2], u[2], v[2], s[2], shared[2];
            CLIPPED ? enter<false>(l, i, x, inward) : enter(l, i, x, inward);
            for (int k = 0; k < CHANNELS; k++) {
                u[k] = x[k] - splat(at.mean[k]);
                if (CLIPPED)
                    gate_as(CLIP, plan.token_numbers, 0, u[k], A, v[k], s[k]);
                else if (plan.token == BUDGET)
                    budget(k, i, u[k], v[k], s[k], shared[k]);
                else
                    gate(plan.token, plan.token_numbers, CHANNEL < 0 ? -1 : k, u[k], A, v[k], s[k]);
                v[k] += splat(at.base[k]);
            }
            md absent = eq(w, zero), direct = lt(zero, zero);
            vd y = CHANNELS == 2 ? v[0] - v[1] : v[0];
            vd G = CHART == DEVIATION ? splat(1.0) + y : exponential(y), factor = G;
            if (!CLIPPED && plan.pessimistic) {
                vd r = exponential(l);
                md minus = lt(A, zero);
                if (CHART == DEVIATION)  // log G is NaN where G < 0
                    direct = le(zero, G) & ((minus & lt(G, r)) | (no(minus) & lt(r, G)));
                else
                    direct = (minus & lt(y, l)) | (no(minus) & lt(l, y));
                direct = direct & no(absent);
                factor = sel(direct, r, G);
            }
            vd term = sel(absent, zero, w * factor);
            if (plan.detached) {
                value += sel(absent, zero, term * load(this->p + i, tokens - i));
                store(out + i, -term, tokens - i);
                continue;
            }
            value += term;
            vd outer = CHART == DEVIATION ? w : w * G;
            vd a = sel(absent | direct, zero, rounded<T>(outer)), own = sel(direct, term, zero);
            sum_a += a;
            for (int k = 0; k < CHANNELS; k++) {
                vd a_k = k ? -a : a, t = sel(eq(a, zero), zero, a_k * s[k]);
                sum_t[k] += t;
                if (!CLIPPED && plan.token == BUDGET) {
                    vd more = sel(eq(a, zero), zero, a_k * shared[k]);
                    if (plan.states)
                        this->to_states(call.shared + k * plan.states, more, i);
                    else
                        t += more * sel(lt(u[k], zero), splat(-1.0), splat(1.0));
                }
                own += sel(eq(t, zero), zero, t * inward[k]);
            }
            store(out + i, -own, tokens - i);
        }
        Adjoint found;
        found.value = total(value), found.a = total(sum_a);
        for (int k = 0; k < CHANNELS; k++)
            found.t[k] = total(sum_t[k]);
        return found;
    }

    void finish(const double *pull, const Above &at) const {
        const vd zero = splat(0.0);
        for (int64_t i = 0; i < tokens; i += D) {
            vd x[2], inward[2], more = zero;
            enter(this->ratio(i), i, x, inward);
            for (int k = 0; k < CHANNELS; k++) {
                vd pulled = splat(pull[k]);
                if (plan.states) {
                    vd u = x[k] - splat(at.mean[k]);
                    vd sum = this->of_states(call.shared + k * plan.states, i);
                    pulled += sel(lt(u, zero), -sum, sel(lt(zero, u), sum, zero));
                }
                more += sel(eq(pulled, zero), zero, pulled * inward[k]);
            }
            store(out + i, load_back(out + i, tokens - i) - more, tokens - i);
        }
    }
};

// Log ratios with a clip (or nothing) at the token, one weight a row, float32 lanes.
//
// On one side of l = 0 the gated log ratio is clamp(l, low, high) + add with four numbers of the
// row, and r is taken in place of G (`pessimistic`) on one side of a fifth.
struct Side {
    float low, high, add, turn;
    bool other;  // whether the channel that the token does not lie in passes

    void set(double from, double to, double more, bool passes, bool minus) {
        const bool upper = minus ? more >= 0 : more > 0;
        const double edge = (upper ? to : from) + more;
        turn = minus ? (edge < INF ? -before(-below(edge)) : edge) : above(edge);
        add = (float)more, other = passes;
        // exp of the result stays in its range: 0 at one end, inf at the other
        low = std::max(above(from), LEAST_F - add), high = std::min(below(to), MOST_F - add);
    }
};

template <int SIDES> struct Swift : Row<float> {
    using Row<float>::Row;

    static bool serves(const Plan &plan, const Call &call) {
        return plan.chart == (SIDES == 2 ? SIGNED_LOG : LOG) && !call.wide &&
               !call.token_advantages && !call.token_scale && plan.first == PASS &&
               !plan.detached && (plan.token == PASS || plan.token == CLIP);
    }

    // Has the row after this one, or what comes later in a long one, fetched meanwhile.
    FIBERPO_INLINE void ahead(int64_t i) const {
        __builtin_prefetch(p + i), __builtin_prefetch(q + i), __builtin_prefetch(out + i, 1);
    }

    void sides(const Above &at, bool minus, Side *side) const {
        double low = -INF, high = INF;
        if (plan.token == CLIP)
            low = plan.token_numbers[minus ? 0 : 2], high = plan.token_numbers[minus ? 1 : 3];
        if (SIDES == 1) {
            const double S = at.mean[0];
            side[0].set(low + S, high + S, at.base[0] - S, false, minus);
        } else {
            double base = at.base[0] - at.base[1], still[2];
            for (int k = 0; k < 2; k++)  // the channel that the token does not lie in
                still[k] = std::min(high, std::max(low, -at.mean[k]));
            const double *S = at.mean;
            side[0].set(low + S[0], high + S[0], base - S[0] - still[1], still[1] == -S[1], minus);
            side[1].set(-high - S[1], -low - S[1], base + S[1] + still[0], still[0] == -S[0],
                        minus);
        }
    }

    // `sides_kept`: the gradient is written with the sign bit set where l < 0; its own sign is that
    // of -w. The finishing sweep then reads nothing else.
    template <bool PESSIMISTIC, bool SIDES_KEPT> Adjoint sweep(const Above &at) const {
        const double adv = advantage(), w = call.scale[segment] * adv;
        Adjoint found;
        if (w == 0) {
            for (int64_t i = 0; i < tokens; i++)
                out[i] = SIDES_KEPT && p[i] < q[i] ? -0.0f : 0.0f;
            return found;
        }
        Side side[2];
        sides(at, adv < 0, side);
        const vf zero = splat(0.0f), weight = splat((float)(SIDES_KEPT ? std::fabs(w) : -w));
        const Side &one = side[0], &two = side[SIDES - 1];
        const vf low[2] = {splat(one.low), splat(two.low)},
                 high[2] = {splat(one.high), splat(two.high)},
                 add[2] = {splat(one.add), splat(two.add)},
                 turn[2] = {splat(one.turn), splat(two.turn)};
        const int64_t far = std::min<int64_t>(tokens, 2048);
        const mf flip = adv < 0 ? no(every()) : every();
        // sums of G: of all tokens, of those where l >= 0; then of those that the token gate passes
        enum { ALL, RIGHT, OPEN, OPEN_RIGHT, VALUE };
        vd sums[5] = {};
        for (int64_t i = 0; i < tokens;) {
            vf part_sums[5] = {};
            auto step = [&](vf l, mf keep, bool whole) FIBERPO_STEP {
                const mf right = le(zero, l);
                auto here = [&](const vf *x) FIBERPO_STEP {
                    return SIDES == 2 ? sel(right, x[0], x[1]) : x[0];
                };
                const vf inside = least(here(high), most(here(low), l));
                const mf open = eq(inside, l);
                vf y = inside + here(add), E, own, A, X;
                if (PESSIMISTIC) {
                    const mf gated = lt(l, here(turn)) ^ flip;
                    E = exponential(sel(gated, y, l));
                    E = whole ? E : sel(keep, E, zero);
                    own = sel(no(gated) | open, E, zero);
                    A = sel(gated, E, zero), X = sel(open, A, zero);
                    part_sums[VALUE] += E;
                } else {
                    E = exponential_inside(y);
                    E = whole ? E : sel(keep, E, zero);
                    A = E, own = X = sel(open, E, zero);
                }
                part_sums[ALL] += A, part_sums[OPEN] += X;
                if (SIDES == 2) {
                    part_sums[RIGHT] += sel(right, A, zero);
                    part_sums[OPEN_RIGHT] += sel(right, X, zero);
                }
                return own * (SIDES_KEPT ? sel(right, weight, -weight) : weight);
            };
            const int64_t end = std::min(tokens, i + 8 * F);
            for (; i + F <= end; i += F) {
                ahead(i + far);
                put(out + i, step(get(p + i) - get(q + i), every(), true));
            }
            if (i < end) {
                const vf l = get(p + i, end - i) - get(q + i, end - i);
                write(out + i, step(l, head(l, end - i), false), end - i);
                i = end;
            }
            for (int k = 0; k < 5; k++)
                sums[k] += widened(part_sums[k]);
        }
        const double all = total(sums[ALL]), open = total(sums[OPEN]),
                     sum = PESSIMISTIC ? total(sums[VALUE]) : all,
                     right = SIDES == 2 ? total(sums[RIGHT]) : all,
                     open_right = SIDES == 2 ? total(sums[OPEN_RIGHT]) : open;
        if (!(sum < 1e30)) {  // near the end of float32
            found = Careful<float, SIDES == 2 ? SIGNED_LOG : LOG>(plan, call, segment).go(at);
            for (int64_t i = 0; SIDES_KEPT && i < tokens; i++)
                out[i] = std::copysign(out[i], p[i] < q[i] ? -1.0f : 1.0f);
            return found;
        }
        found.value = w * sum, found.a = w * all;
        found.t[0] = w * (open_right + (two.other ? all - right : 0));
        found.t[1] = -w * (open - open_right + (one.other ? right : 0));
        return found;
    }

    template <bool SIDES_KEPT> Adjoint go(const Above &at) const {
        return plan.pessimistic ? sweep<true, SIDES_KEPT>(at) : sweep<false, SIDES_KEPT>(at);
    }

    void finish(const double *pull, bool sides_kept) const {
        const double w = call.scale[segment] * advantage();
        const float right = (float)-pull[0], left = (float)pull[SIDES - 1], sign = w > 0 ? -1 : 1;
        const vf to_right = splat(right), to_left = splat(left), signs = splat(sign);
        auto step = [&](vf own, vf p, vf q) FIBERPO_STEP {
            if (SIDES == 1)
                return own + to_right;
            if (!sides_kept)
                return own + sel(le(q, p), to_right, to_left);
            const vf size = absolute(own);
            return size * signs + sel(signed_bit(own), to_left, to_right);
        };
        int64_t i = 0;
        for (; i + F <= tokens; i += F)
            put(out + i, step(get(out + i), get(p + i), get(q + i)));
        if (i < tokens) {
            const int64_t left = tokens - i;
            write(out + i, step(back<vf>(out + i, left), get(p + i, left), get(q + i, left)), left);
        }
    }
};

}  // namespace

#include "cpu_sweeps.h"
