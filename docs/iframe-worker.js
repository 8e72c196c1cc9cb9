// Browsers start no Worker for a page that is opened from disk. The search's worker then runs in a hidden frame instead, so
// that it is found without a server and without a network.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.waiting = [];
      window.addEventListener("message", (event) => {
        if (event.source !== frame.contentWindow) return;
        const answer = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(answer);
        if (this.onmessage) this.onmessage(answer);
      });
      frame.onload = () => {
        this.frame = frame;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      };
      const send = "self.IFrameWorker = true; self.postMessage = (data) => parent.postMessage(data, '*');";
      frame.srcdoc = `<script>${send}<\/script><script src="${new URL(url, location.href)}"><\/script>`;
      document.body ? document.body.append(frame) : addEventListener("DOMContentLoaded", () => document.body.append(frame));
    }
    postMessage(data) {
      if (this.frame) this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data, source: parent }));
      else this.waiting.push(data);
    }
    terminate() {
      if (this.frame) this.frame.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
