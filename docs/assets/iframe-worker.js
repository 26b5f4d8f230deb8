// A worker inside a hidden frame, for pages that were opened as files: browsers start no worker there. The theme's
// search talks to it as to a worker.
"use strict";
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      window.addEventListener("message", (event) => {
        if (event.source === inside) this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      this.ready = new Promise((resolve) => this.frame.addEventListener("load", resolve));
      inside.document.open();
      inside.document.write(`<!doctype html><body><script>
        postMessage = (data) => parent.postMessage(data, "*");
        importScripts = (...urls) => Promise.all(urls.map((url) => new Promise((resolve) => {
          const script = document.createElement("script");
          script.async = false;
          script.src = url;
          script.onload = resolve;
          document.body.append(script);
        })));
      <\/script><script src="${url}"><\/script></body>`);
      inside.document.close();
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
