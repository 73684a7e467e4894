const field = (id) => document.getElementById(id);
const panel = field("panel"), message = field("message");
const flow = tokenFlow(field("flow"), [], showToken);
const ALTERNATIVES = 8, NEXT_TOKENS = 20;
const SAMPLING = ["temperature", "top_k", "top_p", "seed"];
let tokens = [], stopping = null;

document.querySelector(".bar").style.background =
  `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map((p) => shade("mark", p)).join(", ")})`;

// ---- requests

function requestOf(changes) {
  const number = (id) => Number(field(id).value);
  const fields = { prompt: field("prompt").value, num_beams: number("num_beams"), max_tokens: number("max_tokens") };
  Object.assign(fields, { logprobs: ALTERNATIVES, sliding: true, stream: true, ...changes });
  if (fields.num_beams > 1) return fields;
  const sampling = Object.fromEntries(SAMPLING.filter((id) => field(id).value !== "").map((id) => [id, number(id)]));
  return { ...sampling, ...fields };
}

// Disables the settings of sampling if beam search is selected, because beam search does not use them.
function showSettings() {
  for (const id of SAMPLING) field(id).disabled = Number(field("num_beams").value) > 1;
}

field("num_beams").addEventListener("input", showSettings);
showSettings(); // when a page is loaded again, a browser may keep the number of beams that was entered before

// Sends a request, and calls `take` with each choice in the stream of the response. Throws an Error with the server's
// message if the request is refused or fails.
async function complete(fields, take, signal) {
  const response = await fetch("v1/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(fields), signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (pending + value).split("\n\n");
    pending = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") continue;
      const part = JSON.parse(event.slice("data: ".length));
      if (part.error) throw new Error(part.error.message);
      part.choices.forEach(take);
    }
  }
}

async function whileBusy(work) {
  stopping = new AbortController();
  field("generate").disabled = field("next").disabled = true;
  field("stop").disabled = false;
  message.className = "quiet";
  message.textContent = "generating ...";
  try {
    message.textContent = await work(stopping.signal);
  } catch (error) {
    const stopped = error.name === "AbortError";
    message.className = stopped ? "quiet" : "error";
    message.textContent = stopped ? "stopped" : error.message;
  }
  field("generate").disabled = field("next").disabled = false;
  field("stop").disabled = true;
}

field("stop").addEventListener("click", () => stopping.abort());

field("form").addEventListener("submit", (event) => {
  event.preventDefault();
  whileBusy(async (signal) => {
    tokens = [];
    panel.replaceChildren();
    flow.clear();
    const prompt = document.createElement("span");
    prompt.className = "prompt";
    prompt.textContent = field("prompt").value;
    field("flow").append(prompt);
    const began = performance.now();
    let reason = "";
    await complete(requestOf({}), (part) => {
      part.logprobs.tokens.forEach((text, i) => addToken(text, part.logprobs.token_logprobs[i], part.logprobs.top_logprobs[i]));
      reason = part.finish_reason ?? reason;
    }, signal);
    const seconds = (performance.now() - began) / 1000;
    const end = reason === "stop" ? "the model ended the text" : "the number of new tokens was reached";
    return `${tokens.length} tokens in ${seconds.toFixed(1)} s; ${end}`;
  });
});

field("next").addEventListener("click", () => whileBusy(async (signal) => {
  const changes = { max_tokens: 1, temperature: 0, num_beams: 1, logprobs: NEXT_TOKENS };
  await complete(requestOf(changes), (part) => {
    if (part.logprobs.tokens.length) showNext(part.logprobs.top_logprobs[0]);
    else panel.replaceChildren("The model expects the end of the text.");
  }, signal);
  return "";
}));

// ---- tokens

// A JavaScript object lists keys that are integers, such as "2", before all other keys, so the order in which the
// server sent the tokens is lost. They are sorted by probability again.
const ranked = (alternatives) => Object.entries(alternatives).sort((a, b) => b[1] - a[1]);
const bytesOf = (text) => text.replace(/^bytes:(.*)$/s, (_, bytes) => `⟨${bytes.replaceAll("\\x", " ").trim().toUpperCase()}⟩`);

function addToken(text, logprob, alternatives) {
  flow.add(bytesOf(text)).style.background = shade("mark", Math.exp(logprob));
  tokens.push({ text, logprob, alternatives });
}

function showToken(i) {
  const { text, logprob, alternatives } = tokens[i];
  panel.replaceChildren();
  heading(panel, `Token ${i}`, bytesOf(text));
  const description = document.createElement("p");
  description.textContent = `probability ${percent(Math.exp(logprob))}, before temperature, top-k and top-p`;
  panel.append(description);
  const rows = ranked(alternatives);
  if (!rows.length) return;
  table(panel, ["alternative", "probability"], rows.map(([token, p]) => [quoted(bytesOf(token)), percent(Math.exp(p))]));
  panel.querySelectorAll("tbody tr").forEach((row, n) => row.classList.toggle("own", rows[n][0] === text));
}

// Shows the table of next tokens. A click on a token adds it to the prompt and requests the tokens after it.
function showNext(alternatives) {
  panel.replaceChildren();
  const title = document.createElement("h3");
  title.textContent = "Next token after the prompt";
  panel.append(title);
  table(panel, ["token (click to add it)", "probability"], ranked(alternatives).map(([token, p]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(quoted(bytesOf(token)));
    button.disabled = token.startsWith("bytes:");
    button.addEventListener("click", () => {
      field("prompt").value += token;
      field("next").click();
    });
    return [button, percent(Math.exp(p))];
  }));
}
