"use strict";
// What every page of ours has: colours, labels, its data, Plotly.
const COLOURS = {
  light: ["#0072B2", "#D55E00", "#009E73", "#B4568F", "#B07C00", "#2E8BC0", "#444444"],
  dark: ["#56B4E9", "#F58A45", "#2FC79A", "#E29BC6", "#E6B43C", "#9AD0F2", "#D0D0D0"],
};
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x"];
// Plotly reads a few tags in its labels.
const label = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// Gzipped data in the page, as text; used once and then taken out of the page.
async function unpack(id) {
  const place = document.getElementById(id), packed = place.textContent;
  place.remove();
  const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(packed) : decoded(atob(packed));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function decoded(binary) {
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function startPlotly() {
  const plotly = document.createElement("script");
  plotly.textContent = await unpack("data-plotly");
  document.head.append(plotly);
  if (!window.Plotly) throw new Error("Plotly did not start");
}

function undrawn(error) {
  const place = document.getElementById("fault");
  place.hidden = false;
  place.textContent = `This page could not be drawn (${error}). It needs a browser from 2023 or later.`;
}

