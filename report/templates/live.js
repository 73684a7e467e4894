// The live page: it requests itself every two seconds, and replaces the data of the charts and the sections that changed.
const sections = ["summary", "tables", "samples"].map((id) => document.getElementById(id));
const live = document.getElementById("live");
let etag = "";

function replaceSection(section, next) {
  if (section.innerHTML === next.innerHTML) return;
  const open = new Map([...section.querySelectorAll("details")].map((one) => [one.dataset.name, one.open]));
  section.innerHTML = next.innerHTML;
  for (const one of section.querySelectorAll("details")) {
    const was = open.get(one.dataset.name);
    if (was !== undefined) one.open = was;  // old sections stay as the user left them, new samples are open
  }
}

function showPage(text) {
  const next = new DOMParser().parseFromString(text, "text/html");
  const loaded = JSON.parse(next.getElementById("data").textContent);
  if (!loaded || loaded.charts.length !== data.charts.length) return location.reload();  // the first validation adds charts
  Object.assign(data, loaded);
  for (const section of sections) replaceSection(section, next.getElementById(section.id));
  draw();
}

async function refresh() {
  let response, text;
  try {
    response = await fetch(location.href, { cache: "no-store", headers: etag ? { "If-None-Match": etag } : {} });
    text = await response.text();
  } catch {
    live.textContent = "The server has ended, so this page no longer changes.";
    return;
  }
  if (response.status !== 200) return;  // 304: nothing has changed
  etag = response.headers.get("ETag");
  showPage(text);
  live.textContent = `This page follows the training. Last change at ${new Date().toLocaleTimeString()}.`;
}

// The next request is sent two seconds after the last one was answered. So a slow server never has two of them.
const refreshLater = () => setTimeout(() => refresh().finally(refreshLater), 2000);
refreshLater();
