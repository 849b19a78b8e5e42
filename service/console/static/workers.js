// The workers behind the scorers, the encoder, the log and the store.

import { count, html, Note, number, percent, Scroll } from "./lib.js";

const STATES = { closed: ["good", "up"], half_open: ["", "on trial"], open: ["bad", "away"] };

function Replicas({ one }) {
  if (!one.replicas.length) return html`<tr><th scope="row">${one.name}</th><td><span class="badge ${one.available ? "good" : "bad"}">${one.available ? "up" : "away"}</span></td><td>in the gateway</td><td>${one.kind}${one.referee ? ", referee" : ""}</td><td class="num">–</td><td class="num">–</td><td class="num">–</td></tr>`;
  return one.replicas.map((replica, i) => {
    const [level, word] = STATES[replica.state] ?? ["", replica.state];
    return html`<tr>${i === 0 && html`<th scope="row" rowspan=${one.replicas.length}>${one.name}</th>`}
      <td><span class="badge ${level}">${word}</span></td><td class="server"><code>${replica.url}</code>${replica.problem && html`<br/><span class="muted">${replica.problem}</span>`}</td>
      ${i === 0 && html`<td rowspan=${one.replicas.length}>${one.kind}${one.referee ? ", referee" : ""}</td>`}
      <td class="num">${count(replica.in_flight)}</td><td class="num">${replica.latency_ms == null ? "–" : `${number(replica.latency_ms, 1)} ms`}</td><td class="num">${count(replica.failures)}</td></tr>`;
  });
}

export function Workers({ state }) {
  const judges = state.workers.filter((one) => one.judging);
  return html`<section class="card"><h2>Workers</h2><p class="muted">As the gateway process that serves this page sees them; <a href="metrics">the metrics</a> add up all.</p>
    <${Scroll} label="Workers"><table class="plain"><thead><tr><th scope="col">Scorer</th><th scope="col">State</th><th scope="col">Server</th><th scope="col">Kind</th><th scope="col" class="num">In flight</th><th scope="col" class="num">Time</th><th scope="col" class="num">Failures in a row</th></tr></thead>
      <tbody>${state.workers.map((one) => html`<${Replicas} key=${one.name} one=${one}/>`)}</tbody></table><//>
    ${judges.length > 0 && html`<${Scroll} label="Judges"><table class="plain"><caption>Judges</caption><thead><tr><th scope="col">Judge</th><th scope="col">Rubric</th><th scope="col" class="num">Comparisons</th><th scope="col" class="num">Position bias</th><th scope="col" class="num">Consistent</th></tr></thead>
      <tbody>${judges.map(({ name, judging }) => html`<tr><th scope="row">${name}</th><td>${judging.rubric}</td><td class="num">${count(judging.comparisons)}</td><td class="num">${number(judging.position_bias)}</td><td class="num">${percent(judging.consistency)}</td></tr>`)}</tbody></table><//>`}
    ${state.encoder.length > 0 && html`<${Scroll} label="Encoder"><table class="plain"><caption>Encoder</caption><thead><tr><th scope="col">Server</th><th scope="col">State</th></tr></thead>
      <tbody>${state.encoder.map((one) => html`<tr><th scope="row"><code>${one.url}</code></th><td><span class="badge ${one.up ? "good" : "bad"}">${one.up ? "up" : "away"}</span> ${one.problem}</td></tr>`)}</tbody></table><//>`}
  </section>
  <section class="card"><h2>Log and store</h2>
    ${state.problem && html`<${Note} kind="error">${state.problem}<//>`}
    ${state.lag == null && html`<${Note} kind="error">The store does not answer.<//>`}
    ${state.store_problems.map((problem) => html`<${Note} kind="warn">${problem}<//>`)}
    <dl class="facts"><div><dt>Run</dt><dd>${state.run}, ${state.ready ? "ready" : "replaying its log"}</dd></div><div><dt>Learned from</dt><dd>${count(state.version)} events</dd></div><div><dt>Behind the log</dt><dd>${state.lag == null ? "unknown" : `${count(state.lag)} events`}</dd></div>
      <div><dt>Policy</dt><dd><code>${state.policy}</code></dd></div><div><dt>Signal</dt><dd><code>${state.signal}</code></dd></div><div><dt>Prior</dt><dd><code>${state.prior}</code></dd></div>
      ${state.budgets.map((one) => html`<div><dt>Budget of <code>${one.policy}</code></dt><dd>${number(one.budget)} per decision; a further call must raise P(right) by ${one.multiplier.toPrecision(3)} per unit of price</dd></div>`)}</dl>
  </section>`;
}
