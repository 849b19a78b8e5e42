// Who is asked for what, and who is right; what it costs; how sure the router is.

import { count, html, number, Note, percent, Scroll, Swatch, hue, useMemo, useState } from "./lib.js";
import { Chart } from "./charts.js";

const Tile = ({ label, value, hint, level = "" }) =>
  html`<div class="tile ${level}"><dt>${label}</dt><dd><b>${value}</b><span class="muted">${hint}</span></dd></div>`;

function Tiles({ state, report, points }) {
  const up = state.workers.filter((one) => one.available).length;
  const budget = state.budgets[0], last = points[points.length - 1];
  const right = report?.router.accuracy;
  return html`<dl class="tiles">
    <${Tile} label="Decisions" value=${count(state.decisions)} hint=${points.length > 1 ? `${count(last.decisions)} in the last 10 s` : "since the run began"}/>
    <${Tile} label="Callers got the right one" value=${right ? percent(right.value) : "–"} hint=${right ? `${percent(right.low)} to ${percent(right.high)}, ${count(right.audits)} audits` : "needs audits"}/>
    <${Tile} label="Price per decision" value=${number(state.price)} hint=${budget ? `budget ${number(budget.budget)}, a call is worth it above ${budget.multiplier.toPrecision(2)}` : "in units of the cheapest"}/>
    <${Tile} label="Audits waiting" value=${state.audits ? count(state.audits_waiting) : "off"} hint=${state.audits ? "for a referee" : "none in the pool file"}/>
    <${Tile} label="Learned from" value=${count(state.version)} hint=${state.lag == null ? "the store is away" : `events, ${count(state.lag)} behind the log`} level=${state.lag == null || state.lag > 1000 ? "bad" : ""}/>
    <${Tile} label="Scorers up" value=${`${up} of ${state.workers.length}`} hint=${up < state.workers.length ? state.workers.filter((one) => !one.available).map((one) => one.name).join(", ") : "all of them"} level=${up < state.workers.length ? "bad" : ""}/>
  </dl>`;
}

// One scorer on one kind of text: how often it is asked as the depth of the cell, how often it is right as the number.
function Cell({ asked, estimate, best, index }) {
  if (!estimate && asked == null) return html`<td class="cell none muted">–</td>`;
  return html`<td class="cell ${best ? "best" : ""}">
    <div class="right">${estimate ? html`<b>${percent(estimate.value)}</b>${best && html`<span class="star" title="the best here">best</span>`}` : html`<b class="muted">–</b>`}</div>
    ${estimate && html`<svg class="whisker" width="100%" height="8" aria-hidden="true">
      <line class="ground" x1="0" x2="100%" y1="4" y2="4"/><line class="sd" x1=${`${100 * estimate.low}%`} x2=${`${100 * estimate.high}%`} y1="4" y2="4"/>
      <circle cx=${`${100 * estimate.value}%`} cy="4" r="3.5"/></svg>`}
    ${asked != null && html`<div class="asked ${hue(index)}"><span class="bar" style=${{ width: `${100 * asked}%` }}></span></div><div class="muted small">asked ${percent(asked)}</div>`}
  </td>`;
}

const ENOUGH_AUDITS = 10; // Fewer name nobody the best.

// What became of a scorer's place in the pool, as a badge.
const Place = ({ arm }) => (arm?.retired ? html` <span class="badge">retired</span>` : arm?.on_probation ? html` <span class="badge" title="asked of a bounded share until more is known of it">on probation</span>` : null);

function Matrix({ report, state }) {
  const kinds = report.kinds.length > 1 ? report.kinds : [];
  const best = (pick) => Math.max(...report.scorers.map((one) => pick(one)?.value ?? -1));
  const columns = [
    { name: "all texts", of: "all", share: null, asked: (one) => one.asked, right: (one) => one.accuracy },
    ...kinds.map(({ kind, share }) => ({ name: kind, of: kind, share, asked: (one) => one.asked_by_kind[kind] ?? null, right: (one) => one.kinds[kind] })),
  ].map((column) => ({ ...column, top: best(column.right) }));
  return html`<${Scroll} label="Who is asked for what, and who is right">
    <table class="matrix">
      <thead><tr><th scope="col">Scorer</th>${columns.map(({ name, share }) => html`<th scope="col"><span class="kind">${name}</span>${share != null && html` <span class="muted small">${percent(share)} of the texts</span>`}</th>`)}</tr></thead>
      <tbody>
        ${report.scorers.map((one, index) => html`<tr><th scope="row"><${Swatch} index=${index}/>${one.model}<${Place} arm=${state.arms[index]}/>
          ${one.fall >= 1 && html` <span class="badge bad">fell</span>`}${one.liked?.gamed && html` <span class="badge bad">gamed</span>`}</th>
          ${columns.map((column) => html`<${Cell} key=${column.of} index=${index} asked=${column.asked(one)} estimate=${column.right(one)} best=${column.right(one)?.audits >= ENOUGH_AUDITS && column.right(one).value === column.top && report.scorers.length > 1}/>`)}</tr>`)}
        <tr class="router"><th scope="row">what callers got</th>${columns.map((column) => html`<${Cell} key=${column.of} asked=${null} estimate=${column.right(report.router)}/>`)}</tr>
      </tbody>
    </table><//>
    <p class="muted small">Right: by the referee's verdict, with bounds that hold however often one looks. Asked: before the reply. From ${count(report.audits)} audits, weighted to stand for all decisions.</p>`;
}

function Course({ report, theme }) {
  const kinds = report.kinds.length > 1 ? ["all", ...report.kinds.map(({ kind }) => kind)] : ["all"];
  const [wanted, setKind] = useState("all"), kind = kinds.includes(wanted) ? wanted : "all";
  const times = report.parts_ms.map((ms) => ms / 1e3);
  const lines = (of) => report.scorers.map((one, index) => ({ label: one.model, tone: hue(index), values: one.course[kind]?.[of] ?? [] }));
  return html`<div class="row between"><h3>Since the first audit</h3>
    ${kinds.length > 1 && html`<label>Kind of text <select value=${kind} onChange=${(event) => setKind(event.target.value)}>${kinds.map((name) => html`<option value=${name}>${name === "all" ? "all texts" : name}</option>`)}</select></label>`}</div>
  <div class="charts">
    <${Chart} title="Who is asked" hint="share of the decisions" times=${times} series=${lines("asked")} range=${[0, 1]} theme=${theme}/>
    <${Chart} title="Who is right" hint="by the referee" times=${times} series=${lines("accuracy")} range=${[0, 1]} theme=${theme}/>
  </div>`;
}

const ENOUGH = 30; // Decisions that a share or a price is a mean over, at least,
const MOST_POINTS = 30; // unless they reach back for more than so many points.

// The mean of `pick(point)` over each point and as many before it as hold enough decisions; null without any.
function rolling(points, pick) {
  return points.map((_, end) => {
    let decisions = 0, total = 0;
    for (let at = end; at >= 0 && at > end - MOST_POINTS && decisions < ENOUGH; at--) {
      decisions += points[at].decisions;
      total += points[at].decisions ? points[at].decisions * pick(points[at]) : 0;
    }
    return decisions ? total / decisions : null;
  });
}

function Live({ state, points, theme }) {
  const times = useMemo(() => points.map((point) => point.time_ms / 1e3), [points]);
  const of = (values, index) => points.map((point) => point[values]?.[index] ?? null);
  const expected = state.arms.map((arm, index) => {
    const means = of("means", index), sds = of("sds", index);
    const side = (sign) => means.map((mean, i) => (mean == null ? null : mean + sign * sds[i]));
    return { label: arm.model, tone: hue(index), values: means, low: side(-1), high: side(1) };
  });
  const price = [{ label: "price", tone: "accent", values: rolling(points, (point) => point.price) }];
  if (state.budgets[0]) price.push({ label: "budget", tone: "muted", dash: true, values: points.map(() => state.budgets[0].budget) });
  const share = state.arms.map((arm, index) => ({ label: arm.model, tone: hue(index), values: rolling(points, (point) => point.asked[index] ?? 0) }));
  return html`<h3>The last hour</h3><div class="charts">
    <${Chart} title="What each is expected to be worth" hint="posterior mean, ± one standard deviation, on recent texts" times=${times} series=${expected} format=${number} theme=${theme} empty="Nothing was asked yet."/>
    <${Chart} title="Who is asked" hint="share of the decisions, over 30 or more" times=${times} series=${share} range=${[0, 1]} theme=${theme}/>
    <${Chart} title="Price per decision" hint="in units of the cheapest scorer" times=${times} series=${price} format=${number} theme=${theme}/>
  </div>`;
}

function Posterior({ state }) {
  const learns = state.signal === "preference" ? "Right in" : "Mean reward";
  return html`<${Scroll} label="What is known of each scorer"><table class="plain">
    <caption>What is known of each scorer</caption>
    <thead><tr><th scope="col">Scorer</th><th scope="col" class="num">Price</th><th scope="col" class="num">Asked</th><th scope="col" class="num">Feedbacks</th><th scope="col" class="num">${learns}</th><th scope="col" class="num">Expected now</th><th scope="col" class="num">Doubt</th><th scope="col" class="num">Found changed</th></tr></thead>
    <tbody>${state.arms.map((arm, index) => html`<tr><th scope="row"><${Swatch} index=${index}/>${arm.model}<${Place} arm=${arm}/></th><td class="num">${number(arm.price)}</td>
      <td class="num">${count(arm.asked)} <span class="muted">${state.decisions ? percent(arm.asked / state.decisions) : ""}</span></td><td class="num">${count(arm.feedbacks)}</td>
      <td class="num">${state.signal === "preference" ? percent(arm.mean_reward) : number(arm.mean_reward)}</td><td class="num">${number(arm.mean, 3)}</td><td class="num">± ${number(arm.sd, 3)}</td><td class="num">${arm.alarms ? html`<span class="badge bad">${arm.alarms}×</span>` : "–"}</td></tr>`)}</tbody>
  </table><//>`;
}

function Referees({ report }) {
  if (!report.referees.length) return null;
  return html`<${Scroll} label="Referees"><table class="plain"><caption>Referees</caption>
    <thead><tr><th scope="col">Referee</th><th scope="col" class="num">Audits</th><th scope="col" class="num">Ties</th><th scope="col" class="num">With gold</th><th scope="col" class="num">Right against gold</th><th scope="col" class="num">Trusted</th><th scope="col">Teaches</th></tr></thead>
    <tbody>${report.referees.map((one) => html`<tr><th scope="row">${one.referee}</th><td class="num">${count(one.audits)}</td><td class="num">${count(one.ties)}</td><td class="num">${count(one.judged)}</td>
      <td class="num">${one.accuracy ? html`${percent(one.accuracy.value)} <span class="muted">${percent(one.accuracy.low)}–${percent(one.accuracy.high)}</span>` : "–"}</td><td class="num">${percent(one.trust)}</td><td>${one.teaches ? "yes" : html`<span class="badge bad">no better than the scorers</span>`}</td></tr>`)}</tbody>
  </table><//>`;
}

export function Overview({ state, report, points, theme }) {
  const audited = report && report.audits > 0;
  return html`<${Tiles} state=${state} report=${report} points=${points}/>
    <section class="card"><h2>Who is asked for what, and who is right</h2>
      ${audited ? html`<${Matrix} report=${report} state=${state}/><${Course} report=${report} theme=${theme}/><${Referees} report=${report}/>`
        : state.audits ? html`<${Note}>No audit is done yet. Decisions are chosen as they come; ${count(state.audits_waiting)} wait for a referee.<//>`
        : html`<${Note}>Audits are off, so nobody says who is right but the feedback, and kinds of text are not told apart. Put <code>audit</code> into the pool file: <code>docs/audits.md</code>.<//>`}
    </section>
    <section class="card"><h2>What it believes</h2><${Posterior} state=${state}/><${Live} state=${state} points=${points} theme=${theme}/></section>`;
}
