// The newest decisions: what was drawn, who was asked, what came of it.

import { clock, html, Note, number, percent, Scroll, useState } from "./lib.js";
import { Beliefs } from "./charts.js";

export const Attempts = ({ attempts }) => html`<${Scroll} label="Attempts"><table class="plain"><caption>Attempts</caption>
  <thead><tr><th scope="col">Scorer</th><th scope="col">Outcome</th><th scope="col">Rewards</th><th scope="col" class="num">Time</th><th scope="col" class="num">Price</th></tr></thead>
  <tbody>${attempts.map((one) => html`<tr><th scope="row">${one.model}</th><td><span class="badge ${one.outcome === "answered" ? "good" : one.outcome === "abstained" ? "" : "bad"}">${one.outcome}</span> ${one.reason && html`<code>${one.reason}</code>`}</td>
    <td>${one.rewards ? one.rewards.map((reward) => number(reward, 3)).join(", ") : "–"}</td><td class="num">${number(one.ms, 1)} ms</td><td class="num">${number(one.price)}</td></tr>`)}</tbody></table><//>`;

export const Text = ({ label, children }) => html`<div class="text"><div class="label muted">${label}</div><pre tabindex="0">${children}</pre></div>`;

function Decision({ one, state }) {
  const rows = state.arms.map((arm, k) => ({
    model: arm.model, mean: one.means[k], sd: one.sds[k], draw: one.draws?.[k] ?? null, chance: one.propensities[k],
    after: state.version > one.version ? one.now_means[k] : null, afterSd: one.now_sds[k],
  }));
  return html`<div class="decision">
    <p>The policy <code>${one.policy}</code> had learned from ${one.version} events. ${one.draws ? "" : "The draw is that of an earlier response to the same prompt."}
      ${one.audited ? " It was chosen for an audit." : ""} ${one.recorded ? "" : html`<span class="badge bad">not saved</span>`} <code class="muted">${one.decision_id}</code></p>
    ${one.prompt != null && html`<${Text} label="Prompt">${one.prompt}<//>${one.responses.map((text, i) => html`<${Text} label=${`Response ${i + 1}${one.preferred === i ? ", preferred" : ""}`}>${text}<//>`)}`}
    <${Beliefs} rows=${rows} chosen=${one.model} caption="Beliefs and draws" word="spread of draws"/>
    <${Attempts} attempts=${one.attempts}/>
  </div>`;
}

export function Decisions({ state }) {
  const [held, setHeld] = useState(null), [open, setOpen] = useState(null);
  const list = held ?? state.newest;
  const shown = list.map((one) => state.newest.find((now) => now.decision_id === one.decision_id) ?? one);
  return html`<section class="card">
    <div class="row between"><h2>Recent decisions</h2><button type="button" aria-pressed=${held != null} onClick=${() => setHeld(held ? null : state.newest)}>${held ? "Follow again" : "Hold the list"}</button></div>
    <p class="muted">The newest ${state.newest.length}. ${state.texts ? "Texts are shown from their beginnings." : html`Texts are not kept; the setting <code>console_texts</code> shows them.`}</p>
    ${!list.length && html`<${Note}>Nothing was decided yet. Send a request, or use “Try it”.<//>`}
    <ul class="decisions">${shown.map((one) => {
      const is = open === one.decision_id;
      return html`<li key=${one.decision_id} data-decision=${one.decision_id}><button type="button" class="line" aria-expanded=${is} onClick=${() => { setOpen(is ? null : one.decision_id); if (!is && !held) setHeld(state.newest); }}>
        <span class="muted">${clock(one.time_ms)}</span> <b>${one.model}</b>
        <span>${one.preferred == null ? "no preference" : `prefers response ${one.preferred + 1}`}</span>
        <span class="muted">right: ${percent(one.p_right)}</span> <span class="muted">chance: ${percent(one.propensity)}</span>
        <span class="muted">${one.attempts.length} ${one.attempts.length === 1 ? "attempt" : "attempts"}</span>${one.audited && html`<span class="badge">audited</span>`}
        ${one.attempts.some((it) => it.outcome === "failed" || it.outcome === "away") && html`<span class="badge bad">fallback</span>`}
      </button>${is && html`<${Decision} one=${one} state=${state}/>`}</li>`;
    })}</ul>
  </section>`;
}
