// Starts everything: what the server is, which view is shown, and the stream of frames that all views live from.

import { get, watch } from "./api.js";
import { Chat } from "./chat.js";
import { $, setText } from "./dom.js";
import { Overview } from "./overview.js";
import { Requests } from "./requests.js";
import { showDecisions, showScaling } from "./scaling.js";
import { showFacts, showStatus } from "./status.js";
import { setUpTheme } from "./theme.js";

const VIEWS = ["overview", "requests", "scaling", "chat"];

async function start() {
  const about = await get("/console/api/about");
  document.title = `${about.model} · ${about.instance_id}`;
  setText($("model"), about.model);
  setText($("instance"), about.instance_id);
  setText($("version"), `appliance ${about.version}`);
  $("logout").hidden = !about.login;
  const overview = new Overview(about, problem);
  const requests = new Requests();
  new Chat(about);
  setUpTheme(() => overview.refresh());

  let state = null;
  let decision = null;
  let factsAt = 0;
  function onFrame(frame) {
    showStatus(frame, about);
    showScaling(frame);
    if (frame.at_wall - factsAt >= 10 || frame.engine.state !== state) {
      factsAt = frame.at_wall;
      showFacts(frame, about);
    }
    if (state !== null && frame.engine.state !== state) setTimeout(() => overview.showEvents(), 2000); // rows are written a moment later
    state = frame.engine.state;
    const newest = frame.scaling?.last_decision?.id ?? null;
    if (newest !== decision && !$("view-scaling").hidden) showDecisions(about);
    decision = newest;
    overview.onFrame(frame);
  }

  function route() {
    const [name, rest] = location.hash.slice(1).split("/");
    const view = VIEWS.includes(name) ? name : "overview";
    for (const other of VIEWS) $(`view-${other}`).hidden = other !== view;
    for (const link of document.querySelectorAll("nav a")) {
      if (link.dataset.view === view) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (view === "overview") {
      overview.refresh();
      overview.showEvents();
    }
    if (view === "requests") rest ? requests.find(decodeURIComponent(rest)) : requests.load(true);
    if (view === "scaling") showDecisions(about);
    if (view === "chat") $("chat-input").focus();
  }

  window.addEventListener("hashchange", route);
  await overview.start();
  route();
  watch(onFrame, (connected) => {
    if (connected) return;
    setText($("state"), "no connection");
    $("state").dataset.state = "away";
  });
  if (!about.metrics_enabled) problem({ message: "metrics.enabled is off: nothing is measured, and the charts stay empty." });
  document.documentElement.dataset.started = "yes";
}

function problem(error) {
  $("problem").hidden = false;
  setText($("problem"), error.message);
}

start().catch(problem);
