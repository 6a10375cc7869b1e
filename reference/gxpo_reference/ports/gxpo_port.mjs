// gxpo_core.mjs under the conformance suite, which starts this file and speaks JSON lines with it (STDIO.md). For Node 18
// or later and nothing else:
//
//     gxpo-conformance --exec "node reference/gxpo_reference/ports/gxpo_port.mjs"
//
// What goes out on the wire is a copy by nature (DEV-02).

import { readSync, writeSync } from "node:fs";

import { Session } from "./gxpo_core.mjs";

const CAPABILITIES = {
  dtypes: ["float64", "float32"],
  devices: ["cpu"],
  optimizers: ["sgd", "adamw"],
  estimators: ["gradient", "displacement", "tensor"],
  optimizer_state: ["keep", "restore"],
  gate_statistics: ["corrective_norm", "initial_norm", "disagreement", "supplied", "never"],
  gate_baselines: ["window", "ema"],
  gate_options: ["patience", "two_sided", "warmup", "cooldown", "max_active_steps"],
  max_grad_norm: true,
  checkpoint: true,
  nonfinite_gradients: true,
  nonfinite_losses: true,
  exceptions: true,
};

const KINDS = { float64: Float64Array, float32: Float32Array };
const NON_FINITE = new Set(["NaN", "Infinity", "-Infinity"]);

/**
 * A message as a line. JSON.stringify writes the shortest decimals that give a double back, and a float32 is sent as
 * the double that it equals. (-0 is sent as 0, which equals it.)
 */
function encode(message) {
  return JSON.stringify(message, (key, value) => {
    if (ArrayBuffer.isView(value)) return Array.from(value);
    return typeof value === "number" && !Number.isFinite(value) ? String(value) : value; // no JSON numbers for these
  });
}

const decode = (line) => JSON.parse(line, (key, value) => (NON_FINITE.has(value) ? Number(value) : value));

/** Call a system call until it can be served: standard input and output may have been set not to block. */
function patiently(call) {
  for (;;) {
    try {
      return call();
    } catch (error) {
      if (error.code === "EOF") return 0; // how Windows tells that a pipe has ended
      if (error.code !== "EAGAIN") throw error;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1); // sleep for 1 ms
    }
  }
}

function say(message) {
  let left = Buffer.from(`${encode(message)}\n`);
  while (left.length > 0) left = left.subarray(patiently(() => writeSync(1, left)));
}

const chunk = Buffer.alloc(1 << 16);
let pending = Buffer.alloc(0); // read, but not yet a whole line

/** The next message. Blocks, so that asking for a gradient is a plain function call in the middle of a step. */
function hear() {
  let end;
  while ((end = pending.indexOf("\n")) < 0) {
    const size = patiently(() => readSync(0, chunk));
    if (size === 0) process.exit(0); // whoever was speaking has gone
    pending = Buffer.concat([pending, chunk.subarray(0, size)]);
  }
  const line = pending.toString("utf8", 0, end);
  pending = pending.subarray(end + 1);
  return decode(line);
}

/** The loss failed, at the other end: passed on from the step (ATM-01), and no error of this port's. */
class LossFailed extends Error {}

/** A session beside the names and shapes that its tensors have on the wire. */
class Served {
  constructor({ params, config, dtype }) {
    this.kind = KINDS[dtype];
    this.layout = Object.entries(params).map(([name, { shape }]) => ({ name, shape }));
    this.session = new Session(this.received(params), config);
  }

  received(arrays) {
    return this.layout.map(({ name }) => this.kind.from(arrays[name].data));
  }

  sent(tensors) {
    return Object.fromEntries(this.layout.map(({ name, shape }, t) => [name, { shape, data: tensors[t] }]));
  }

  grad(theta) {
    say({ ask: this.sent(theta) });
    const answer = hear();
    if ("raise" in answer) throw new LossFailed(answer.raise);
    return { loss: answer.loss, g: this.received(answer.grads) };
  }

  step({ statistic }) {
    this.session.step((theta) => this.grad(theta), statistic);
    return { done: true };
  }

  params() {
    return { params: this.sent(this.session.theta) };
  }

  /** What the session knows beyond its parameters, which a resumed one is started from (CKP). */
  save() {
    return { saved: { state: this.session.state, gate: this.session.gate.memory } };
  }

  load({ saved: { state, gate } }) {
    const tensors = (moments) => moments.map((data) => this.kind.from(data));
    this.session.state = { n: state.n, m: tensors(state.m), v: tensors(state.v) };
    this.session.gate.memory = gate;
    return { ok: true };
  }
}

/** Throws for what makes no sense or is not declared. */
function check({ dtype, device, config }) {
  const { horizon, optimizer, estimator, optimizer_state, gate } = config;
  const chosen = {
    dtypes: dtype,
    devices: device,
    optimizers: optimizer.name,
    estimators: estimator,
    optimizer_state,
    gate_statistics: gate.statistic,
    gate_baselines: gate.baseline,
  };
  for (const [key, value] of Object.entries(chosen)) {
    if (!CAPABILITIES[key].includes(value)) throw new Error(`${key}: ${value} is not one of ${CAPABILITIES[key]}`);
  }
  const whole = { horizon: [horizon, 2], window: [gate.window, 1], patience: [gate.patience, 1] }; // horizon: EXT-06
  for (const [name, [n, least]] of Object.entries(whole)) {
    if (!Number.isInteger(n) || n < least) throw new Error(`${name} must be an integer of ${least} or more, got ${n}`);
  }
}

const sessions = new Map();

function served({ session }) {
  if (!sessions.has(session)) throw new Error(`there is no session ${session}`);
  return sessions.get(session);
}

function start(message) {
  check(message);
  sessions.set(message.session, new Served(message));
  return { ok: true };
}

const ANSWERS = {
  hello: () => ({ protocol: "1.1", name: "gxpo in JavaScript", version: "1.1", capabilities: CAPABILITIES }),
  start,
  step: (message) => served(message).step(message),
  params: (message) => served(message).params(),
  save: (message) => served(message).save(),
  load: (message) => served(message).load(message),
  close: ({ session }) => ({ ok: sessions.delete(session) }),
};

function answer(message) {
  try {
    if (!Object.hasOwn(ANSWERS, message.op)) throw new Error(`there is no op ${message.op}`);
    return ANSWERS[message.op](message);
  } catch (error) {
    return { [error instanceof LossFailed ? "raised" : "error"]: error.message };
  }
}

for (let message = hear(); message.op !== "bye"; message = hear()) say(answer(message));
