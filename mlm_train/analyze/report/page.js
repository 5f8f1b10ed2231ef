"use strict";
// Texts of tokens and paths are only ever put into the page as text, never as HTML.
const read = (id) => JSON.parse(document.getElementById(id)?.textContent ?? "null");
const make = (tag, text, parent) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
};
// Without plotly's button that sends the figure to a server.
const CONFIG = { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "" };
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;"); // for plotly
const MARGIN = { l: 60, r: 20, t: 20, b: 50 };

for (const [number, figure] of (read("figures") ?? []).entries()) {
  for (const trace of figure.data) trace.name = plain(trace.name);
  const layout = { margin: MARGIN, showlegend: true, ...figure.layout };
  Plotly.newPlot(`figure-${number}`, figure.data, layout, CONFIG);
}

function unpack(text, Type) {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let n = 0; n < letters.length; n++) bytes[n] = letters.charCodeAt(n);
  return new Type(bytes.buffer);
}

function keysSection(analyses, texts) {
  const [analysis, layer, search] = ["analysis", "layer", "search"].map((id) => document.getElementById(id));
  const shown = texts.map((text, token) => (text === null ? `#${token}` : visible(text)));
  const cache = new Map();
  let chosen = null; // the token that was searched for

  function visible(text) {
    const seen = text.replaceAll(" ", "␣").replaceAll("\n", "\\n").replaceAll("\t", "\\t").replaceAll("\r", "\\r");
    return seen.replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g, (letter) =>
      "\\u" + letter.charCodeAt(0).toString(16).padStart(4, "0"));
  }

  function load(number) {
    const id = `layer-${analysis.value}-${number}`;
    if (!cache.has(id)) {
      const data = read(id);
      const halves = unpack(data.values, Uint16Array);
      cache.set(id, {
        ...data,
        cluster: unpack(data.cluster, Uint16Array),
        keys: unpack(data.keys, data.wide ? Uint32Array : Uint16Array),
        values: new Float32Array(new Uint32Array(halves).map((half) => half << 16).buffer),
        map: unpack(data.map, Uint32Array),
        places: unpack(data.places, Float32Array),
      });
    }
    return cache.get(id);
  }

  function word(token, parent) {
    const button = make("button", shown[token], parent);
    button.className = "word";
    button.title = `token ${token}`;
    button.addEventListener("click", () => choose(token));
    parent.append(" ");
  }

  const colour = (cluster) => `hsl(${(cluster * 137.508) % 360}, 65%, ${40 + 12 * (cluster % 3)}%)`;

  function drawMap() {
    const data = load(layer.value);
    const at = Array.from(data.map);
    const trace = (tokens, marker) => ({
      type: canDraw ? "scattergl" : "scatter",
      mode: "markers",
      hoverinfo: "text",
      x: tokens.map((n) => data.places[2 * n]),
      y: tokens.map((n) => data.places[2 * n + 1]),
      text: tokens.map((n) => {
        const [name] = data.clusters[data.cluster[at[n]]];
        return `${plain(shown[at[n]])}<br>cluster ${data.cluster[at[n]]}: ${plain(name)}`;
      }),
      marker,
    });
    const all = trace([...at.keys()], { size: 4, color: at.map((token) => colour(data.cluster[token])) });
    const one = trace(at.flatMap((token, n) => (token === chosen ? [n] : [])), {
      size: 16, color: "rgba(0,0,0,0)", line: { color: "black", width: 3 },
    });
    const bare = { showgrid: false, zeroline: false, showticklabels: false };
    const layout = { margin: { l: 5, r: 5, t: 5, b: 5 }, showlegend: false, hovermode: "closest", xaxis: bare, yaxis: bare };
    document.getElementById("map").hidden = at.length === 0;
    if (at.length) Plotly.react("map", [all, one], layout, CONFIG);
  }

  function drawTables() {
    const { columns, statistics } = analyses[analysis.value];
    const table = document.getElementById("statistics");
    table.replaceChildren();
    const head = make("tr", undefined, table);
    for (const column of columns) make("th", column, head);
    for (const row of statistics) {
      const line = make("tr", undefined, table);
      line.classList.toggle("chosen", row[0] === layer.value);
      for (const [n, cell] of row.entries()) make("td", cell, line).dataset.column = columns[n];
    }
    const data = load(layer.value);
    const clusters = document.getElementById("clusters");
    clusters.replaceChildren();
    const titles = make("tr", undefined, clusters);
    for (const title of ["", "cluster", "tokens", "central tokens"]) make("th", title, titles);
    for (const [n, [name, size, central]] of data.clusters.entries()) {
      const line = make("tr", undefined, clusters);
      line.classList.toggle("chosen", chosen !== null && data.cluster[chosen] === n);
      make("td", "●", line).style.color = colour(n);
      make("td", `${n} ${name}`, line);
      make("td", size, line);
      const cell = make("td", undefined, line);
      for (const token of central) word(token, cell);
    }
  }

  function drawToken() {
    const place = document.getElementById("token");
    place.replaceChildren();
    if (chosen === null) return;
    make("h3", `token ${chosen} ${shown[chosen]}`, place);
    const table = make("table", undefined, place);
    const head = make("tr", undefined, table);
    for (const title of ["layer", "top keys (c)", "cluster", "others of the cluster"]) make("th", title, head);
    for (const number of analyses[analysis.value].layers) {
      const data = load(number);
      const cluster = data.cluster[chosen];
      const line = make("tr", undefined, table);
      line.dataset.layer = number;
      line.classList.toggle("chosen", String(number) === layer.value);
      make("td", number, line);
      const keys = Array.from({ length: data.width }, (_, n) => {
        const key = data.keys[chosen * data.width + n];
        const outlier = data.outliers.includes(key) ? "*" : "";
        return `${key}${outlier} (${data.values[chosen * data.width + n].toPrecision(3)})`;
      });
      make("td", keys.join("  "), line).className = "keys";
      const name = make("td", `${cluster} ${data.clusters[cluster][0]}`, line);
      name.className = "cluster";
      name.dataset.cluster = cluster;
      const cell = make("td", undefined, line);
      for (const token of mates(data, cluster)) word(token, cell);
    }
    if (table.textContent.includes("*")) make("p", "* an outlier key of its layer", place);
  }

  function mates(data, cluster) {
    const found = new Set(data.clusters[cluster][2]); // nearest to the centre first
    for (let token = 0; token < data.cluster.length && found.size < 20; token++)
      if (data.cluster[token] === cluster) found.add(token);
    found.delete(chosen);
    return found;
  }

  function find(text) {
    if (/^#\d+$/.test(text) && Number(text.slice(1)) < texts.length) return [Number(text.slice(1))];
    const lower = text.toLowerCase();
    const [exact, close, within] = [[], [], []];
    for (const [token, known] of texts.entries()) {
      if (known === null) continue;
      if (known === text) exact.push(token);
      else if (known.trim() === text.trim()) close.push(token);
      else if (within.length < 20 && known.toLowerCase().includes(lower)) within.push(token);
    }
    return [...exact, ...close, ...within].slice(0, 20);
  }

  function choose(token) {
    chosen = token;
    draw();
  }

  function draw() {
    drawToken();
    drawMap();
    drawTables();
  }

  function layers() {
    const before = layer.value;
    layer.replaceChildren();
    for (const number of analyses[analysis.value].layers) make("option", number, layer).value = number;
    if (analyses[analysis.value].layers.map(String).includes(before)) layer.value = before;
    draw();
  }

  for (const [number, one] of analyses.entries()) make("option", one.path, analysis).value = number;
  analysis.addEventListener("change", layers);
  layer.addEventListener("change", draw);
  search.addEventListener("input", () => {
    const found = search.value === "" ? [] : find(search.value);
    const matches = document.getElementById("matches");
    matches.replaceChildren();
    for (const token of found) word(token, matches);
    if (search.value !== "" && found.length === 0) make("em", "no such token", matches);
    choose(found.length ? found[0] : null);
  });
  layers();
}

const canDraw = Boolean(document.createElement("canvas").getContext("webgl"));
const analyses = read("analyses");
if (analyses?.length) keysSection(analyses, read("texts"));
