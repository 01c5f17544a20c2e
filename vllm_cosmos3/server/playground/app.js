// The page: what the server can do is asked first, then each part is set up for it.

import { get, useKey } from "./api.js";
import * as chat from "./chat.js";
import { element, find, say } from "./dom.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import { offered } from "./modes.js";
import * as stage from "./stage.js";

const LOOK = 10000; // milliseconds between looks at the server's health

/** Tabs as the pattern of WAI-ARIA has them: arrows move, the chosen one is in the tab order. */
function open(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    find(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
}

function setUpTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  for (const tab of tabs) {
    tab.addEventListener("click", () => open(tab.id.slice(4)));
    tab.addEventListener("keydown", (event) => {
      const there = tabs.filter((each) => !each.hidden);
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const other = there[(there.indexOf(tab) + step + there.length) % there.length];
      other.click();
      other.focus();
    });
  }
}

/** Ask for the key until the server takes it; the models that it then tells. */
async function models() {
  for (;;) {
    try {
      return await get("v1/cosmos3/models");
    } catch (error) {
      if (error.status === 401) await askForKey();
      else {
        say(find("notice"), `${error.message}; trying again`);
        await new Promise((resolve) => { setTimeout(resolve, 2000); });
        say(find("notice"), "");
      }
    }
  }
}

let refused = false;

async function askForKey() {
  const dialog = find("key-dialog");
  say(find("key-error"), refused ? "The server does not know this key." : "");
  refused = true;
  find("key").value = "";
  dialog.showModal();
  await new Promise((resolve) => { dialog.addEventListener("close", resolve, { once: true }); });
  useKey(find("key").value);
  find("key").value = "";
}

async function tellHealth(name) {
  try {
    const { queue } = await get("health");
    const waiting = queue.waiting ? `${queue.waiting} waiting` : queue.running ? "at work" : "ready";
    tellServer("dot", `${name} · ${waiting}`);
  } catch (error) {
    tellServer("dot bad", `${name} · ${error.message}`);
  }
}

function tellServer(className, text) {
  if (find("server").textContent === text) return; // screen readers hear what changes
  find("server").replaceChildren(element("span", { className }), text);
}

async function start() {
  setUpTabs();
  const facts = await get("");
  find("docs-link").hidden = !facts.links.docs;
  const [{ id, cosmos3: capability }] = (await models()).data;
  find("key-button").hidden = !facts.key_needed;
  find("key-button").addEventListener("click", () => location.reload()); // which forgets the key, and asks
  const fail = (error) => say(find("notice"), error?.message);
  const ask = !facts.surfaces.includes("reasoner") ? null : (blob, name) => {
    open("ask");
    chat.attach(blob, name);
  };
  const uses = {
    again: (made, fields) => { form.fill(made, fields); find("prompt").focus(); },
    vary: form.vary,
    goOn: capability.modes.includes("image2video") ? form.goOn : null,
    ask,
  };
  if (ask) {
    find("tab-ask").hidden = false;
    chat.setUp(id);
  }
  if (offered(capability).length) form.setUp(capability, stage.select);
  stage.setUp(capability, uses);
  await gallery.setUp(uses, fail);
  document.body.dataset.ready = "true";
  for (;;) {
    await tellHealth(id);
    await new Promise((resolve) => { setTimeout(resolve, LOOK); });
  }
}

start().catch((error) => say(find("notice"), error.message));
