const bytes = Uint8Array.from(atob(data.embeddings.bdata), (character) => character.charCodeAt(0));
const embeddings = new Float32Array(bytes.buffer);  // (positions, width) row by row; little-endian, as in all browsers
const positions = embeddings.length / data.width;
const chosen = document.getElementById("chosen");

function heatmap(z, scale, unit, extra) {
  return {
    type: "heatmap", z, zmin: -scale, zmax: scale,
    colorscale: [[0, color("--low")], [0.5, color("--page")], [1, color("--high")]],
    colorbar: { thickness: 12, title: { text: unit, side: "top" }, outlinewidth: 0 }, ...extra,
  };
}

function axes(x, y, reversed) {
  const layout = layoutOf({ l: 10, r: 10, t: 30, b: 10 });
  layout.xaxis.title = { text: x };
  Object.assign(layout.yaxis, { title: { text: y } }, reversed ? { autorange: "reversed" } : {});
  return layout;
}

function drawCurves() {
  const words = chosen.value.split(/[\s,;]+/).filter(Boolean);
  const valid = words.filter((word) => /^\d+$/.test(word) && Number(word) < data.width).map(Number);
  document.getElementById("message").textContent = valid.length < words.length ? `expected numbers from 0 to ${data.width - 1}, separated by commas` : "";
  const traces = valid.map((dimension, i) => ({
    type: "scatter", mode: "lines", name: `dimension ${dimension}`,
    y: Array.from({ length: positions }, (_, position) => embeddings[position * data.width + dimension]),
    line: { color: color(`--run-${i % 5}`), width: 1.5, dash: ["solid", "dash", "dot"][Math.floor(i / 5) % 3] },
    hovertemplate: "%{fullData.name}<br>position %{x}<br>%{y:.4f}<extra></extra>",
  }));
  const layout = axes("position", "value");
  Object.assign(layout, { showlegend: true, legend: { orientation: "h", y: -0.25, yanchor: "top" } });
  Plotly.react("curves", traces, layout, plotConfig);
}

function draw() {
  Plotly.react("image", [heatmap(data.embeddings, data.scale, "value", {
    hovertemplate: "position %{y}, dimension %{x}<br>%{z:.4f}<extra></extra>",
  })], axes("dimension", "position", true), plotConfig);
  Plotly.react("similarity", [heatmap(data.cosines, 1, "cosine", {
    dx: data.every, dy: data.every, hovertemplate: "positions %{x} and %{y}<br>%{z:.4f}<extra></extra>",
  })], axes("position", "position", true), plotConfig);
  drawCurves();
}

chosen.addEventListener("change", drawCurves);
drawAndFollowTheme(draw);
