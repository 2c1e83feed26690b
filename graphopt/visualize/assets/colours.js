"use strict";
// Colours and numbers for people.

const COLOUR = {
  forward: "#2f6db5", backward: "#c0562f", update: "#6a5aa8", saved: "#2e8b6d", collective: "#b0368f",
  ghost: "#b23a48", added: "#2e8b57", ink: "#1d2430", faint: "#8a94a3", line: "#c9d0da", axis: "#e0a100",
};
const PHASE_COLOUR = [COLOUR.forward, COLOUR.backward, COLOUR.update];
const PHASE_FILL = ["#dfeaf7", "#f9e6dc", "#e8e4f4"];
const PHASE_NAME = ["forward", "backward", "update"];

// From nothing to all of the step: a share of 0.1 % is the first colour, of 100 % the last; logarithmic between.
const RAMP = ["#fbfbf8", "#fdf1cf", "#fddc93", "#fbb863", "#f28a45", "#dc5a32", "#b3302a", "#7f1424"];
const SMALLEST = 1e-3;

function heat(share) {
  if (!(share > 0)) return "#ffffff";
  const t = Math.min(Math.max(1 + Math.log10(share) / -Math.log10(SMALLEST), 0), 1) * (RAMP.length - 1);
  const low = Math.floor(t), high = Math.min(low + 1, RAMP.length - 1), part = t - low;
  const [a, b] = [RAMP[low], RAMP[high]].map((c) => [1, 3, 5].map((k) => parseInt(c.slice(k, k + 2), 16)));
  return "#" + a.map((v, k) => Math.round(v + (b[k] - v) * part).toString(16).padStart(2, "0")).join("");
}

function inkOn(colour) {
  const [r, g, b] = [1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16));
  return 0.299 * r + 0.587 * g + 0.114 * b < 140 ? "#ffffff" : COLOUR.ink;
}

function figure(number, units, base) {
  if (!number) return "0";
  let k = 0;
  let value = number;
  while (Math.abs(value) >= base && k < units.length - 1) { value /= base; k += 1; }
  const digits = Math.abs(value) >= 100 || (k === 0 && Number.isInteger(value)) ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[k]}`.trim();
}
const flopsText = (n) => figure(n, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"], 1000);
const bytesText = (n) => figure(n, ["B", "KiB", "MiB", "GiB", "TiB"], 1024);
const secondsText = (s) => figure(s * 1e9, ["ns", "µs", "ms", "s"], 1000);
const measureText = (measure, value) => ({ seconds: secondsText, FLOPs: flopsText, bytes: bytesText })[measure](value || 0);
const percent = (share) => !(share > 0) ? "" : share >= 0.0995 ? `${(100 * share).toFixed(0)} %` : share >= 0.001 ? `${(100 * share).toFixed(1)} %` : "<0.1 %";
