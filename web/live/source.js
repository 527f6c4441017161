// Where frames come from in the browser: camera, screen or a video file, always as the newest frame of a <video>.
const REASONS = {
  NotAllowedError: "The browser or the user refused it. Allow it beside the address, then press Start.",
  NotFoundError: "No camera was found. Connect one, or choose a video file.",
  NotReadableError: "Another program uses the camera. Close it, then press Start.",
  OverconstrainedError: "The camera cannot do this. Choose another one.",
};

// Milliseconds without a new frame until the last one counts again. A screen at rest gives none, and none is announced in a hidden page.
const REST = 200;

export class Source {
  constructor(video, onFrame) {
    Object.assign(this, { video, onFrame, token: 0, stream: null, kind: "" });
    video.muted = video.loop = video.playsInline = true;
  }

  /** Open a source; throws an Error whose message is one sentence with the remedy. */
  async open(kind, file) {
    this.close();
    const token = ++this.token;
    if (kind === "file") {
      if (!file) throw new Error("Choose a video file first.");
      this.video.src = URL.createObjectURL(file);
    } else {
      const stream = await this.device(kind);
      if (token !== this.token) return stream.getTracks().forEach((track) => track.stop());
      this.stream = stream;
      this.video.srcObject = stream;
      stream.getVideoTracks()[0].addEventListener("ended", () => token === this.token && this.close());
    }
    this.kind = kind;
    try {
      await this.video.play();
    } catch {
      if (token !== this.token) return;
      this.close();
      throw new Error(kind === "file" ? "The browser cannot play this video, or the page forbids it (ComfyUI with --disable-api-nodes does). Choose an MP4 or WebM file." : "The source gives no images.");
    }
    this.watch(token);
  }

  async device(kind) {
    const devices = navigator.mediaDevices;
    if (!devices) throw new Error("The browser gives cameras to pages of localhost and https only. Open this page there, or choose a video file.");
    try {
      if (kind === "screen") return await devices.getDisplayMedia({ video: { frameRate: 30 }, audio: false });
      return await devices.getUserMedia({ video: { width: { ideal: 1280 }, height: { ideal: 720 }, frameRate: { ideal: 30 } }, audio: false });
    } catch (error) {
      throw new Error(REASONS[error.name] ?? `The source cannot be opened (${error.message}).`);
    }
  }

  /** Call onFrame(time of capture) for each new frame, and for the last one again where none comes: a changed prompt is to be seen then too. */
  watch(token) {
    const video = this.video;
    let [timer, handle] = [0, 0];
    const step = (now, data) => {
      clearTimeout(timer);
      if (token !== this.token) return;
      const captured = data?.captureTime;
      this.onFrame(captured > now - 1000 && captured <= performance.now() ? captured : performance.now());
      next();
    };
    const again = () => {
      video.cancelVideoFrameCallback?.(handle);
      step(performance.now());
    };
    const next = () => {
      handle = video.requestVideoFrameCallback?.(step);
      timer = setTimeout(again, handle === undefined ? 33 : REST);
    };
    next();
  }

  get opened() {
    return Boolean(this.kind);
  }

  close() {
    this.token += 1;
    this.kind = "";
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = null;
    this.video.pause();
    if (this.video.src) URL.revokeObjectURL(this.video.src);
    this.video.removeAttribute("src");
    this.video.srcObject = null;
  }
}
