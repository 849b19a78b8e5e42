// Charts: lines over time (uPlot), and beliefs of scorers as intervals (SVG).

import { clock, html, hue, number, percent, Scroll, Swatch, useEffect, useRef, useState } from "./lib.js";

// The colour that a class has now, for the canvas.
function colour(name) {
  const probe = document.createElement("span");
  probe.className = `probe ${name}`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

const faint = (rgb, alpha) => rgb.replace("rgb(", "rgba(").replace(")", `, ${alpha})`);

// uPlot's options for these series; `sides` gives each one's bounds their places behind the lines.
function options(series, { range, format, width, height, onIndex, stretch }) {
  const text = colour("muted"), grid = faint(colour("line"), 0.7);
  const lines = series.map(({ label, tone, dash }) => ({
    label, stroke: colour(tone), width: 2, dash: dash ? [6, 5] : undefined, spanGaps: true,
    points: { show: (_, __, first, last) => last - first < 12, size: 6, fill: colour(tone) },
  }));
  const bounds = [], bands = [];
  series.forEach(({ low, tone }) => {
    if (!low) return;
    const place = 1 + series.length + bounds.length;
    bounds.push({ stroke: "transparent", width: 0, points: { show: false } }, { stroke: "transparent", width: 0, points: { show: false } });
    bands.push({ series: [place + 1, place], fill: faint(colour(tone), 0.13) });
  });
  const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  return {
    width, height, padding: [10, 24, 0, 0], series: [{}, ...lines, ...bounds], bands, legend: { show: false },
    cursor: { y: false, points: { size: 7 }, drag: { x: false, y: false } },
    scales: { y: range ? { range } : { range: (_, low, high) => { const room = Math.max(0.08 * (high - low), 0.05 * Math.abs(high), 0.01); return [low - room, high + room]; } } },
    axes: [
      { ...axis, size: 28, space: 80, values: (_, splits) => splits.map((at) => clock(1e3 * at, 1e3 * stretch)) },
      { ...axis, size: 52, values: (_, splits) => splits.map((at) => format(at)) },
    ],
    hooks: { setCursor: [(plot) => onIndex(plot.cursor.idx)] },
  };
}

// Lines over time. `series`: {label, tone, values, low, high, dash}; `times` in seconds.
export function Chart({ title, hint, times, series, range, format = percent, theme, empty = "Nothing yet." }) {
  const frame = useRef(), plot = useRef(), [index, setIndex] = useState(null);
  const stretch = times.length ? times[times.length - 1] - times[0] : 0;
  const bounded = series.filter((one) => one.low);
  const data = [times, ...series.map((one) => one.values), ...bounded.flatMap((one) => [one.low, one.high])];
  const shape = JSON.stringify([series.map((one) => [one.label, one.tone, !!one.low]), theme, range, times.length > 1, stretch > 3e2, stretch > 864e2]);
  const shown = times.length > 0;
  useEffect(() => {
    if (!shown) return undefined;
    const width = () => Math.max(frame.current.clientWidth, 120);
    plot.current = new uPlot(options(series, { range, format, width: width(), height: 200, onIndex: setIndex, stretch }), data, frame.current);
    const sized = new ResizeObserver(() => plot.current.setSize({ width: width(), height: 200 }));
    sized.observe(frame.current);
    return () => {
      sized.disconnect();
      plot.current.destroy();
      plot.current = null;
    };
  }, [shape, shown]);
  useEffect(() => { plot.current?.setData(data); });
  const at = index == null || index >= times.length ? times.length - 1 : index;
  const latest = (values) => {
    for (let i = at; i >= 0; i--) if (values[i] != null) return values[i];
    return null;
  };
  const said = series.map((one) => `${one.label} ${format(latest(one.values))}`).join(", ");
  return html`<figure class="chart">
    <figcaption><strong>${title}</strong> ${hint && html`<span class="muted">${hint}</span>`}</figcaption>
    ${shown ? html`<div ref=${frame} role="img" aria-label=${`${title}. Latest: ${said}`}></div>` : html`<p class="empty muted">${empty}</p>`}
    ${shown && html`<ul class="legend">${series.map((one) => html`<li><span class="swatch ${one.tone} ${one.dash ? "dashed" : ""}" aria-hidden="true"></span>${one.label} <b>${format(latest(one.values))}</b></li>`)}
      <li class="muted when">${clock(1e3 * times[at], 1e3 * stretch)}</li></ul>`}
  </figure>`;
}

// What is believed of each scorer: an interval of two standard deviations, the draw as a dot, and below what is
// believed now. `rows`: {model, mean, sd, draw, chance, after, afterSd}.
export function Beliefs({ rows, caption, chosen, word = "doubt" }) {
  const ends = rows.flatMap((row) => [
    row.mean == null ? null : row.mean - 2 * row.sd, row.mean == null ? null : row.mean + 2 * row.sd, row.draw,
    row.after == null ? null : row.after - 2 * row.afterSd, row.after == null ? null : row.after + 2 * row.afterSd,
  ]).filter((value) => value != null);
  const low = Math.min(...ends), high = Math.max(...ends), span = high - low || 1;
  const x = (value) => `${3 + (94 * (value - low)) / span}%`;
  const moved = rows.some((row) => row.after != null), drawn = rows.some((row) => row.draw != null);
  return html`<${Scroll} label=${caption}><table class="beliefs">
    <caption>${caption}</caption>
    <thead><tr><th scope="col">Scorer</th><td class="plot"></td><th scope="col" class="num">Expected ± ${word}</th>${drawn && html`<th scope="col" class="num">Draw</th>`}
      ${moved && html`<th scope="col" class="num">Now ± doubt</th>`}<th scope="col" class="num">Chance</th></tr></thead>
    <tbody>${rows.map((row, index) => html`<tr class=${row.model === chosen ? "chosen" : ""}>
      <th scope="row"><${Swatch} index=${index}/>${row.model}</th>
      <td class="plot"><svg class=${hue(index)} width="100%" height="30" aria-hidden="true">
        ${row.mean != null && html`<line class="sd" x1=${x(row.mean - 2 * row.sd)} x2=${x(row.mean + 2 * row.sd)} y1="11" y2="11"/>
          <line class="mean" x1=${x(row.mean)} x2=${x(row.mean)} y1="5" y2="17"/>`}
        ${row.after != null && html`<line class="sd" x1=${x(row.after - 2 * row.afterSd)} x2=${x(row.after + 2 * row.afterSd)} y1="23" y2="23"/>
          <line class="mean" x1=${x(row.after)} x2=${x(row.after)} y1="18" y2="28"/>`}
        ${row.draw != null && html`<circle cx=${x(row.draw)} cy="11" r="5"/>`}
      </svg></td>
      <td class="num">${row.mean == null ? "not asked here" : html`${number(row.mean)} <span class="muted">± ${number(row.sd)}</span>`}</td>
      ${drawn && html`<td class="num">${number(row.draw)}</td>`}
      ${moved && html`<td class="num">${row.after == null ? "–" : html`${number(row.after)} <span class="muted">± ${number(row.afterSd)}</span>`}</td>`}
      <td class="num">${percent(row.chance)}</td>
    </tr>`)}</tbody>
  </table><//>`;
}
