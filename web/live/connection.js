// One connection to a live stream, which comes back by itself when it is lost. Newest wins in both directions.
import { FRAME, REPEAT, RESULT, pack, unpack } from "./wire.js";

const BUFFERED = 1 << 18; // bytes that may wait to be sent: a frame beyond is left out
const AGAIN = [0.3, 0.6, 1.2, 2.5, 5]; // seconds until the next try
const TRIES = 8;
export const LEFT = "Left.";

export class Connection {
  /** `on` has open(), text(message), result(head), closed(reason): the last is called once. `view`: others send the frames. */
  constructor(url, on, view = false) {
    Object.assign(this, { url, on, view, sequence: 0, left: 0, tries: 0, ended: false, lost: false });
    this.key = [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
    this.onHide = () => this.close();
    window.addEventListener("pagehide", this.onHide);
    this.open();
  }

  open() {
    const socket = new WebSocket(`${this.url}?key=${this.key}${this.view ? "&view=1" : ""}`);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => {
      [this.tries, this.lost, this.opened] = [0, false, true];
      this.on.open();
    };
    socket.onmessage = ({ data }) => this.take(data);
    socket.onclose = ({ code, reason }) => socket === this.socket && this.closed(code, reason);
  }

  take(data) {
    if (typeof data === "string") {
      const message = JSON.parse(data);
      if (message.type === "ended") this.finish(message.reason);
      else this.on.text(message);
      return;
    }
    const message = unpack(data);
    if (message && (message.kind === RESULT || message.kind === REPEAT)) this.on.result(message);
  }

  closed(code, reason) {
    if (this.ended) return;
    if (code === 1013) return this.finish(reason || "The stream takes no more clients.");
    if (this.tries >= (this.opened ? TRIES : 2)) return this.finish(this.opened ? "The connection was lost." : "There is no such stream any more.");
    const seconds = AGAIN[Math.min(this.tries++, AGAIN.length - 1)];
    this.lost = true;
    this.on.text({ type: "lost", seconds });
    this.timer = setTimeout(() => this.ended || this.open(), 1000 * seconds);
  }

  finish(reason) {
    if (this.ended) return;
    this.ended = true;
    window.removeEventListener("pagehide", this.onHide);
    this.on.closed(reason);
  }

  get ready() {
    return this.socket.readyState === WebSocket.OPEN;
  }

  /** Whether a frame would go out now; if not it is counted as left out. */
  get free() {
    const free = this.ready && this.socket.bufferedAmount < BUFFERED;
    this.left += free ? 0 : 1;
    return free;
  }

  sendFrame(captured, body) {
    if (this.ready) this.socket.send(pack(FRAME, ++this.sequence, captured, body));
  }

  send(message) {
    if (this.ready) this.socket.send(JSON.stringify(message));
  }

  close() {
    this.finish(LEFT);
    clearTimeout(this.timer);
    this.socket.close(1000);
  }
}
