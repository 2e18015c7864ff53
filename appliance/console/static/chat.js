// A box to try the model: streams from the same endpoint that every client uses, and says what it measured.

import { errorOf } from "./api.js";
import { $, h } from "./dom.js";
import { number, seconds } from "./format.js";

export class Chat {
  constructor(about) {
    this.about = about;
    this.messages = [];
    this.abort = null;
    $("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("chat-input").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      $("chat-form").requestSubmit();
    });
    $("chat-stop").addEventListener("click", () => this.abort?.abort());
    $("chat-clear").addEventListener("click", () => this.clear());
  }

  clear() {
    this.abort?.abort();
    this.messages = [];
    $("chat-log").replaceChildren();
    $("chat-input").focus();
  }

  async send() {
    const text = $("chat-input").value.trim();
    if (!text || this.abort) return;
    $("chat-input").value = "";
    this.messages.push({ role: "user", content: text });
    bubble("user", "You").body.textContent = text;
    const answer = bubble("assistant", this.about.model);
    this.abort = new AbortController();
    this.busy(true);
    try {
      await this.stream(answer);
    } catch (error) {
      answer.note.textContent = error.name === "AbortError" ? "stopped" : error.message;
      if (error.name !== "AbortError") answer.note.setAttribute("role", "alert");
    } finally {
      if (answer.body.textContent) this.messages.push({ role: "assistant", content: answer.body.textContent });
      else this.messages.pop(); // a question without an answer is asked again, not answered twice
      this.abort = null;
      this.busy(false);
    }
  }

  async stream(answer) {
    const began = performance.now();
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      signal: this.abort.signal,
      body: JSON.stringify({
        model: this.about.model,
        messages: this.messages,
        temperature: Number($("temperature").value),
        max_tokens: Number($("max-tokens").value),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!response.ok) throw await errorOf(response);
    let first = null;
    let usage = null;
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const content = event.choices[0]?.delta?.content;
      if (!content) continue;
      first ??= performance.now();
      answer.body.append(content);
      keepAtEnd();
    }
    const took = (performance.now() - began) / 1000;
    const rate = usage && first !== null && usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / ((performance.now() - first) / 1000) : null;
    const told = [first === null ? null : `first token ${seconds((first - began) / 1000)}`, rate === null ? null : `${number(rate)} tokens/s`, usage ? `${usage.prompt_tokens} + ${usage.completion_tokens} tokens` : null, seconds(took)];
    answer.note.replaceChildren(told.filter(Boolean).join(" · "), " ", h("a", { href: `#requests/${encodeURIComponent(response.headers.get("X-Request-Id") ?? "")}` }, "its ledger"));
    keepAtEnd();
  }

  busy(busy) {
    $("chat-stop").hidden = !busy;
    $("chat-send").disabled = busy;
    $("chat-log").setAttribute("aria-busy", String(busy)); // a screen reader reads the answer when it is whole
  }
}

function bubble(role, name) {
  const body = h("p", { class: "text" });
  const note = h("p", { class: "muted note" });
  $("chat-log").append(h("article", { class: `bubble ${role}` }, h("h3", {}, name), body, note));
  keepAtEnd();
  return { body, note };
}

function keepAtEnd() {
  $("chat-log").scrollTop = $("chat-log").scrollHeight;
}

/** The parsed events of a stream of server-sent events, up to [DONE]. */
async function* events(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += decoder.decode(value, { stream: true });
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue; // a comment keeps idle connections open
      const data = block.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
