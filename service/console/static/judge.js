// Judge audits blind: responses in random order, nothing shown of what referee and scorers said until you have.

import { html, Note, useCallback, useEffect, useRef, useState } from "./lib.js";
import { call } from "./api.js";
import { Text } from "./decisions.js";

function shuffled(n) {
  const order = [...Array(n).keys()];
  for (let i = n - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

const choice = (index, order) => (index == null ? "a tie" : `response ${order.indexOf(index) + 1}`);

function Reveal({ last }) {
  const { audit, order, preferred } = last;
  const agree = Object.entries(audit.verdicts).filter(([, verdict]) => verdict === preferred).map(([name]) => name);
  return html`<${Note} kind="good">Your judgement, ${choice(preferred, order)}, is in the log. ${audit.referee}, the referee, had said ${choice(audit.preferred, order)}.
    ${agree.length ? ` With you: ${agree.join(", ")}.` : " No scorer was with you."}<//>`;
}

export function Judge({ run }) {
  const [queue, setQueue] = useState(null), [total, setTotal] = useState(0), [done, setDone] = useState(0), [last, setLast] = useState(null);
  const [error, setError] = useState(""), [busy, setBusy] = useState(false), heading = useRef();
  const load = useCallback(async () => {
    setError("");
    try {
      const audits = await call(`audits?run=${encodeURIComponent(run)}&count=200`);
      const waiting = audits.filter((one) => !one.judged).map((audit) => ({ audit, order: shuffled(audit.responses.length) }));
      setQueue(waiting);
      setTotal(audits.length);
    } catch (problem) { setError(problem.message); }
  }, [run]);
  useEffect(() => { setQueue(null); setLast(null); setDone(0); load(); }, [load]);
  const current = queue?.[0];
  const next = () => { setQueue(queue.slice(1)); heading.current?.focus(); };
  async function judge(preferred) {
    if (busy) return;
    setBusy(true);
    setError("");
    try {
      await call("audits/judge", { run, decision_id: current.audit.decision_id, preferred });
      setLast({ ...current, preferred });
      setDone(done + 1);
      next();
    } catch (problem) { setError(problem.message); } finally { setBusy(false); }
  }
  const press = useRef();
  press.current = (event) => {
    if (!current || event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
    const place = Number(event.key);
    if (place >= 1 && place <= current.order.length) judge(current.order[place - 1]);
    else if (event.key === "t") judge(null);
    else if (event.key === "s") { setLast(null); next(); }
    else return;
    event.preventDefault();
  };
  useEffect(() => {
    const listen = (event) => press.current(event);
    document.addEventListener("keydown", listen);
    return () => document.removeEventListener("keydown", listen);
  }, []);
  return html`<section class="card judge"><h2 tabindex="-1" ref=${heading}>Judge audits</h2>
    <p class="muted">Which response is better? What you say is gold: it teaches the scorers, and the referee is measured by it. Responses stand in random order, and nothing is shown of what anybody said before you have.</p>
    ${error && html`<${Note} kind="error">${error}<//>`}
    <div role="status">${last && html`<${Reveal} last=${last}/>`}</div>
    ${queue && !current && html`<${Note}>${total ? `No audit waits for a judgement; ${total} are kept.` : "There are no audits yet. They need `audit` in the pool file."}<//><button type="button" onClick=${load}>Look again</button>`}
    ${current && html`<div class="audit" key=${current.audit.decision_id}>
      <p class="muted">${queue.length} to judge${done ? `, ${done} judged` : ""}</p>
      <${Text} label="Prompt">${current.audit.prompt}<//>
      ${current.audit.reference != null && html`<${Text} label="Reference">${current.audit.reference}<//>`}
      <div class="responses">${current.order.map((index, place) => html`<div class="response"><${Text} label=${`Response ${place + 1}`}>${current.audit.responses[index]}<//>
        <button type="button" class="primary" disabled=${busy} onClick=${() => judge(index)}>Response ${place + 1} is better <kbd>${place + 1}</kbd></button></div>`)}</div>
      <div class="row"><button type="button" disabled=${busy} onClick=${() => judge(null)}>Neither: a tie <kbd>t</kbd></button>
        <button type="button" disabled=${busy} onClick=${() => { setLast(null); next(); }}>Skip <kbd>s</kbd></button></div>
    </div>`}
  </section>`;
}
