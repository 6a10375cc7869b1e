// GXPO (Gradient Extrapolation-Based Policy Optimization, arXiv 2605.06755) in JavaScript: the method, for wherever
// JavaScript runs, without a package and without a word of what runs it.
//
//     const session = new Session(theta, config); // theta: a list of Float64Array or Float32Array
//     session.step((theta) => ({ loss, g })); // g: a list like theta; asked for three times in an active step
//     session.step(grad, entropy); // a number of the caller's own, for a gate whose statistic is "supplied"
//     session.theta; // where that led
//
// Written from the rules of conformance/gxpo_conformance/SPEC.md, whose clause numbers (EST-02) stand beside what they
// ask for, to be read by whoever writes a port in C++, Rust or Julia. Two parts: the method, the gate. `config` is as
// the specification has it; gxpo_port.mjs, beside this file, puts it all under the conformance suite.
//
// Letters are the paper's: theta, g, r, q, alpha, K. A *tensor* is a Float64Array or a Float32Array, row by row; theta,
// g and the optimizer's moments are lists of tensors, always in the same order. Names and shapes stay with the caller.
//
// Precision: JavaScript computes in double and rounds when a value is put into an array, so a float32 run is float32
// wherever something is stored. In a language with real float32 arithmetic nothing else is needed than to use it.
//
// Nothing is changed in place. A step builds new arrays beside the old ones and the session takes them over at the very
// end; whatever fails before that has changed nothing, and there is no rollback to get wrong (ATM, NUM-02 to NUM-06).

// ---------------------------------------------------------------------------------------------------------- the method

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const sum = (numbers) => numbers.reduce((total, x) => total + x, 0);

/** f(a_i, b_i) for every coordinate i of two lists of tensors. */
const combine = (a, b, f) => a.map((tensor, t) => tensor.map((x, i) => f(x, b[t][i])));

const dotOf = (u, v) => u.reduce((total, x, i) => total + x * v[i], 0); // of two tensors
const dot = (a, b) => sum(a.map((tensor, t) => dotOf(tensor, b[t]))); // of two lists: over all tensors together
const norm = (g) => Math.sqrt(dot(g, g));
const rms = (tensor) => Math.sqrt(dotOf(tensor, tensor) / tensor.length);

/** U of torch.optim.SGD (OPT-01, OPT-02). torch has no buffer before the first step; one of zeros does the same. */
function sgd({ lr, momentum, weight_decay }, theta, state, g) {
  const d = combine(g, theta, (gi, x) => gi + weight_decay * x);
  const m = combine(state.m, d, (mi, di) => momentum * mi + di);
  return { theta: combine(theta, m, (x, mi) => x - lr * mi), state: { ...state, m } };
}

/** U of torch.optim.AdamW (OPT-03): the decay acts on theta itself, before the update and outside the moments. */
function adamw({ lr, betas: [beta1, beta2], eps, weight_decay }, theta, state, g) {
  const n = state.n + 1;
  const m = combine(state.m, g, (mi, gi) => beta1 * mi + (1 - beta1) * gi);
  const v = combine(state.v, g, (vi, gi) => beta2 * vi + (1 - beta2) * gi * gi);
  const rate = lr / (1 - beta1 ** n);
  const correction = Math.sqrt(1 - beta2 ** n);
  const update = combine(m, v, (mi, vi) => (rate * mi) / (Math.sqrt(vi) / correction + eps));
  return { theta: combine(theta, update, (x, du) => x * (1 - lr * weight_decay) - du), state: { n, m, v } };
}

const OPTIMIZERS = { sgd, adamw };

/** What both start from: n steps taken, first moments m (SGD's momentum buffer), second moments v (AdamW's alone). */
function freshState(theta) {
  const zeros = theta.map((tensor) => tensor.map(() => 0));
  return { n: 0, m: zeros, v: zeros };
}

/**
 * q = S_K(r) / S_2(r), S_n(r) = 1 + r + ... + r^(n-1): how many times the two-step displacement the K-step one is.
 *
 * 1 + r divides S_K, and what is left is a sum of even powers (EXT-01); for odd K the last one is divided by 1 + r
 * (EXT-02). From r = -1 upwards no term is negative and nothing cancels: not at r = 1, where the closed form
 * (1 - r^K) / (1 - r) is 0 / 0 (EXT-03), nor near r = -1. Below that an odd sum is negative, and the clamp makes it 1
 * (EXT-05).
 */
export function extrapolation(ratio, K) {
  if (!Number.isFinite(ratio)) return 1; // overflow, or a tensor that did not move, 0 / 0 (EST-04, EST-13)
  const r = clamp(ratio, -2, 3);
  let q = 0;
  if (K % 2 === 1) {
    if (Math.abs(1 + r) <= 1e-8) return 1; // the pole (EXT-05)
    q = (r * r) / (1 + r);
  }
  for (let terms = Math.floor(K / 2); terms > 1; terms--) q = r * r * (1 + q); // Horner's rule in r^2
  return clamp(1 + q, 1, K / 2 + 1); // EXT-04
}

/**
 * q for every coordinate of one tensor, from two consecutive gradients or displacements (EST-01, EST-10). What starts
 * out next to nothing, compared with the rest of its own tensor, is noise and is not extrapolated (EST-02, EST-03).
 */
function coordinateScale(first, second, K) {
  const least = 1e-3 * rms(first);
  return first.map((a, i) => (Math.abs(a) > least ? extrapolation(second[i] / a, K) : 1));
}

/** One q for a whole tensor, which keeps the displacement's direction (EST-12); nothing is added below (EST-14). */
function tensorScale(u0, u1, K) {
  const q = extrapolation(dotOf(u0, u1) / dotOf(u0, u0), K);
  return u0.map(() => q);
}

/** One training run: theta, the optimizer's state and the gate, and how the three move on by one outer step. */
export class Session {
  constructor(theta, config) {
    this.config = config;
    this.theta = theta;
    this.state = freshState(theta);
    this.gate = new Gate(config.gate);
  }

  /**
   * One outer step. grad(theta) gives { loss, g } and may throw, in which case the step did not happen. supplied: what
   * the caller measured at theta0, for a gate that watches that.
   */
  step(grad, supplied) {
    if (this.gate.settings.statistic === "supplied" && !Number.isFinite(supplied)) {
      throw new Error(`the gate's statistic is supplied: the step needs a finite number, got ${supplied}`);
    }
    const { theta, state, active, h } = this.proposal(grad, supplied);
    Object.assign(this, { theta, state });
    this.gate.advance(active, h);
  }

  /** Where the step ends: theta', s', whether it was an active one, and what the gate is to see of it, if anything. */
  proposal(grad, supplied) {
    const { theta: theta0, state: s0 } = this;
    const first = this.pass(grad, theta0);
    if (!first.finite) return { theta: theta0, state: s0, active: false }; // skipped (NUM-02)

    // The first fast step is also the whole of a single pass (GAT-08), and so where any failure below leads back to
    // (NUM-03, NUM-04). A zero gradient leaves nothing to extrapolate (NUM-01).
    const one = this.update(theta0, s0, first);
    const single = { ...one, active: false };
    if (!this.gate.open || first.norm === 0) return single;

    const second = this.pass(grad, one.theta);
    if (!second.finite) return single;
    const two = this.update(one.theta, one.state, second);

    const thetaTilde = this.move(theta0, one.theta, two.theta, first, second);
    const third = this.pass(grad, thetaTilde);
    if (!third.finite) return single;

    // The corrective step (COR-01) takes the state as the fast steps left it, or as it was (OPT-04, OPT-05).
    const state = this.config.optimizer_state === "keep" ? two.state : s0;
    return { ...this.update(thetaTilde, state, third), active: true, h: this.gate.statistic(first, third, supplied) };
  }

  /** One backward pass: the gradient g, its norm, and given = c g, clipped by its own norm (CLP-01). */
  pass(grad, theta) {
    const { loss, g } = grad(theta);
    const size = norm(g);
    const C = this.config.max_grad_norm;
    const c = C === null ? 1 : Math.min(1, C / (size + 1e-6));
    const given = g.map((tensor) => tensor.map((x) => c * x));
    return { g, given, norm: size, finite: Number.isFinite(loss) && Number.isFinite(size) }; // the loss: NUM-05
  }

  /** U: the optimizer, given a pass's clipped gradient. */
  update(theta, state, { given }) {
    return OPTIMIZERS[this.config.optimizer.name](this.config.optimizer, theta, state, given);
  }

  /**
   * theta~ = theta0 + alpha (thetaK - theta0), thetaK = theta0 + q (theta2 - theta0). alpha multiplies all of q
   * (MOV-01, MOV-02), unclamped (MOV-03), and the displacement is the one that the optimizer made (MOV-04).
   */
  move(theta0, theta1, theta2, first, second) {
    const q = this.scale(theta0, theta1, theta2, first, second);
    const displacement = combine(theta2, theta0, (x2, x0) => x2 - x0);
    const scaled = combine(q, displacement, (qi, d) => this.config.alpha * qi * d);
    return combine(theta0, scaled, (x0, d) => x0 + d);
  }

  /** q of every coordinate, by the configured estimator of r. */
  scale(theta0, theta1, theta2, first, second) {
    const { estimator, horizon: K } = this.config;
    // The ratio of what the optimizer was really given (CLP-02).
    if (estimator === "gradient") return first.given.map((g0, t) => coordinateScale(g0, second.given[t], K));
    const u0 = combine(theta1, theta0, (x1, x0) => x1 - x0);
    const u1 = combine(theta2, theta1, (x2, x1) => x2 - x1);
    const ofTensor = estimator === "tensor" ? tensorScale : coordinateScale; // EST-11: activity, too, reads u0
    return u0.map((u, t) => ofTensor(u, u1[t], K));
  }
}

// ------------------------------------------------------------------------------------------------------------ the gate

/** h of an active step, from its first and third pass, before clipping (CLP-03); undefined: nothing to observe. */
const STATISTICS = {
  corrective_norm: (first, third) => third.norm, // GAT-07
  initial_norm: (first) => first.norm, // GAT-20
  disagreement(first, third) { // GAT-21
    const cos = third.norm === 0 ? 0 : dot(first.g, third.g) / first.norm / third.norm;
    return 1 - Math.abs(cos);
  },
  supplied: (first, third, supplied) => supplied,
  never: () => undefined, // GAT-22
};
const NO_STREAK = { length: 0, pinned: null }; // surprising observations in a row, the baseline that scored the first
const LEAST_EMA_SIGMA = 0.01; // GAT-19

/** Decides which steps are active. All that it remembers is in `memory`, plain JSON, so that it can be saved. */
export class Gate {
  constructor(settings) {
    this.settings = settings;
    this.statistic = STATISTICS[settings.statistic];
    this.memory = {
      steps: 0, // completed, of any kind
      activeSteps: 0, // completed
      openFrom: 0, // the first step that may be active (again)
      history: [], // the latest observations, no more than the window holds
      ema: { mu: 1, variance: 1, count: 0 },
      streak: NO_STREAK,
    };
  }

  /** Whether the step to come is active. A spent budget outlasts any cooldown (GAT-17, GAT-25). */
  get open() {
    const { steps, activeSteps, openFrom } = this.memory;
    return steps >= openFrom && activeSteps < (this.settings.max_active_steps ?? Infinity);
  }

  /** A step is completed. Single passes observe nothing (GAT-16), nor does the warm-up (GAT-14). */
  advance(active, h) {
    if (h !== undefined && this.memory.steps >= this.settings.warmup) this.observe(h);
    this.memory.steps += 1;
    if (active) this.memory.activeSteps += 1;
  }

  /** Score h by what preceded it (GAT-02), or by the baseline that an open streak has pinned (GAT-11, GAT-23). */
  observe(h) {
    const { steps, streak } = this.memory;
    const { patience, cooldown } = this.settings;
    const baseline = streak.pinned ?? this.baseline();
    this.remember(h); // also underneath a streak (GAT-12)
    const length = baseline !== null && this.surprising(h, baseline) ? streak.length + 1 : 0; // GAT-10
    const tripped = length >= patience;
    this.memory.streak = length === 0 || tripped ? NO_STREAK : { length, pinned: baseline }; // GAT-24
    // The present step stands; single passes follow, for good (GAT-01) or for as long as the cooldown lasts (GAT-15).
    if (tripped) this.memory.openFrom = steps + 1 + (cooldown ?? Infinity);
  }

  /** { mu, sigma } of the observations so far; null while there are too few to score by (GAT-04, GAT-18). */
  baseline() {
    const { history, ema } = this.memory;
    if (this.settings.baseline === "ema") {
      return ema.count < 2 ? null : { mu: ema.mu, sigma: Math.max(Math.sqrt(ema.variance), LEAST_EMA_SIGMA) };
    }
    const w = this.settings.window;
    if (history.length < w) return null;
    const mu = sum(history) / w;
    return { mu, sigma: Math.sqrt(sum(history.map((x) => (x - mu) ** 2)) / w) }; // the population's (GAT-03)
  }

  remember(h) {
    const { omega, window } = this.settings;
    const { mu, variance, count } = this.memory.ema;
    this.memory.history = [...this.memory.history, h].slice(-window); // GAT-06
    this.memory.ema = {
      mu: (1 - omega) * mu + omega * h,
      variance: (1 - omega) * variance + omega * (h - mu) ** 2, // by the old mean (GAT-18)
      count: count + 1,
    };
  }

  /** One-sided unless asked otherwise (GAT-05, GAT-13); 1e-9 makes a constant history no error (GAT-09). */
  surprising(h, { mu, sigma }) {
    const z = (h - mu) / (sigma + 1e-9);
    return (this.settings.two_sided ? Math.abs(z) : z) >= this.settings.threshold;
  }
}
