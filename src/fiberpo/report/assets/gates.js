// The formulas of fiberpo.gates and fiberpo.gating, for the regime explorer; a test compares both.
"use strict";
(function (root) {
  const PASS = 0, ROLLBACK = 1, ZERO = 2;

  // Aggregate gate g(x, C, k), Eq. 10: pass, roll back with slope -k, zero.
  function gate(x, budget, k) {
    const size = Math.abs(x);
    if (size <= budget) return { value: x, slope: 1, regime: PASS };
    if (size < (1 + 1 / k) * budget) {
      return { value: Math.sign(x) * (k + 1) * budget - k * x, slope: -k, regime: ROLLBACK };
    }
    return { value: 0, slope: 0, regime: ZERO };
  }

  // Log clip, Eq. 12; |x| = epsilon is not saturated.
  function clip(x, epsilon) {
    return Math.abs(x) > epsilon ? Math.sign(x) * epsilon : x;
  }

  // Log base weight of two residual drifts: g(plus, C+, k) - g(minus, C-, k), Eq. 8.
  function base(plus, minus, budget, k) {
    return gate(plus, budget[0], k).value - gate(minus, budget[1], k).value;
  }

  // Every context of a trajectory, coarse to fine: {s: stratum, up: index of the parent or -1,
  // p, m: S+ and S-, k: tokens}. settings: {budget: [[C+, C-] per stratum or null for the context's
  // own c], rollback: [number or null for the token count, per stratum], epsilon, pessimistic}.
  function gateContexts(contexts, settings) {
    const done = [];
    for (const c of contexts) {
      const above = c.up < 0 ? { p: 0, m: 0 } : contexts[c.up];
      const budget = settings.budget[c.s] || c.c;
      const k = settings.rollback[c.s] === null ? c.k : settings.rollback[c.s];
      const plus = c.p - above.p, minus = c.m - above.m;
      const up = gate(plus, budget[0], k), down = gate(minus, budget[1], k);
      const own = up.value - down.value;
      done.push({
        plus, minus, up, down, budget, k, own,
        total: own + (c.up < 0 ? 0 : done[c.up].total),
      });
    }
    return done;
  }

  // Log gated ratio of every token: log base of its context, plus clip of what the token adds.
  // Pessimistic: the factor of A in min(G A, r A).
  function respond(trajectory, settings) {
    const contexts = gateContexts(trajectory.contexts, settings), epsilon = settings.epsilon;
    const tokens = trajectory.l.map(function (l, i) {
      const leaf = Array.isArray(trajectory.leaf) ? trajectory.leaf[i] : trajectory.leaf;
      const at = trajectory.contexts[leaf];
      const u = Math.max(l, 0) - at.p, v = Math.max(-l, 0) - at.m;
      const fiber = clip(u, epsilon) - clip(v, epsilon);
      const gated = contexts[leaf].total + fiber;
      const advantage = Array.isArray(trajectory.a) ? trajectory.a[i] : trajectory.a;
      const lower = settings.pessimistic && (advantage >= 0 ? l < gated : l > gated);
      // u_i of Def. 5.1 is the residual in the token's own channel
      const saturated = Math.abs(l >= 0 ? u : v) > epsilon;
      return { l, gated: lower ? l : gated, fiber, saturated, ratio: lower };
    });
    return { contexts, tokens };
  }

  root.gates = { PASS, ROLLBACK, ZERO, gate, clip, base, gateContexts, respond };
})(typeof module === "object" && module.exports ? module.exports : (window.fiberpo = {}));
