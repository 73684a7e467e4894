"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// The layout that all plotly charts have in common, in the colors of the current theme.
function layoutOf(margin) {
  const axis = {
    color: color("--quiet"), gridcolor: color("--line"), zeroline: false, automargin: true, exponentformat: "B",
    title: { standoff: 8 },
  };
  return {
    paper_bgcolor: color("--page"), plot_bgcolor: color("--page"), font: { color: color("--text"), size: 12 },
    hoverlabel: { bgcolor: color("--raised"), bordercolor: color("--line"), font: { color: color("--text") }, namelength: -1 },
    // On a touch screen, dragging scrolls the page.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    modebar: { color: color("--quiet"), activecolor: color("--text"), bgcolor: "transparent" },
    margin, hovermode: "closest", showlegend: false, xaxis: { ...axis }, yaxis: { ...axis },
  };
}

const plotConfig = {
  displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "pan2d"],
  showSendToCloud: false, plotlyServerURL: "",  // no buttons that upload the data to plotly's server
};

// After a tap, browsers also send mouse events. With dragmode false, plotly treats them as a second tap: it hides the
// tooltip and resets the zoom. Preventing the default of touchend suppresses these events.
document.addEventListener("touchend", (event) => {
  if (event.cancelable && event.target.closest(".draglayer")) event.preventDefault();
}, { passive: false });

// Draws the page, and draws it again when the user switches between light and dark theme.
function drawAndFollowTheme(draw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}
