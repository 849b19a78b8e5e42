// What every view uses: Preact through htm, and how numbers and times are written.

const { h, render, Fragment } = preact;
export const { useState, useEffect, useRef, useMemo, useCallback } = preactHooks;
export const html = htm.bind(h);
export { render, Fragment };

export const percent = (value, digits = 0) => (value == null ? "–" : `${(100 * value).toFixed(digits)} %`);
export const number = (value, digits = 2) => (value == null ? "–" : value.toFixed(digits));
export const count = (value) => (value == null ? "–" : value.toLocaleString("en"));
export const signed = (value, digits = 3) => (value == null ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`);

const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const SECONDS = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });

// A time in milliseconds, as fine as the stretch of time (in milliseconds) that it is read in needs.
export function clock(ms, stretch = 0) {
  return (stretch > 864e5 ? DAY : stretch > 3e5 ? CLOCK : SECONDS).format(ms);
}

// The class that gives arm `index` its colour.
export const hue = (index) => `hue${index % 8}`;

export const Swatch = ({ index }) => html`<span class="swatch ${hue(index)}" aria-hidden="true"></span>`;

// A table that scrolls sideways by keyboard too.
export const Scroll = ({ label, children }) =>
  html`<div class="scroll" role="region" aria-label=${label} tabindex="0">${children}</div>`;

export const Note = ({ kind = "hint", children }) => html`<p class="note ${kind}" role=${kind === "error" ? "alert" : null}>${children}</p>`;
