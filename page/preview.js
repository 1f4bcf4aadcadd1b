// The page that preview.py makes. It is opened from disk, where a page may load pictures and
// scripts but may read neither files nor pixels: so every file of data is a script, and masks are
// pictures that are laid over frames.
"use strict";

const FRAMES_PER_SECOND = 8;
const NEAR = "600px"; // of the window: within it pictures are loaded, beyond it let go of
const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`);
const DOUBT =
    "doubt: 100 % minus the confidence of an object's class (objects.csv); a video has that of its least sure object";
const figure = (value) => (value === null ? "–" : value.toFixed(3));

// A video: what videos.js knows of it, its card, and, while it is in sight, what video.js told
// (`record`) and its pictures.
const videos = PREVIEW.videos.map((facts) => ({ ...facts, record: null, pictures: {}, waiting: [] }));
const byName = new Map(videos.map((video) => [video.name, video]));
let listed = videos; // those that the filter leaves, in order
let large = null; // the video in the dialog
let wanted = null; // the video that was asked for last, in the dialog or on its way there
let chosen = null; // the class id whose trail alone is drawn there
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
let clock = 0; // frames since the page was opened, while it plays
let position = 0; // frame in the dialog
const inSight = new Set();

// ---- the grid -------------------------------------------------------------------------------

function makeCard(video) {
    const card = make("article", { className: "card", tabIndex: 0 });
    video.card = card;
    video.canvas = make("canvas");
    video.canvas.setAttribute("role", "img");
    const frame = make("div", { className: "picture" }, video.canvas);
    frame.style.aspectRatio = (video.size || [3, 2]).join(" / ");
    video.note = make("span", { className: "note", hidden: true }, "no true masks: predicted ones");
    frame.append(video.note);
    const right = [];
    if (video.miou !== undefined && video.miou !== null) right.push(`mIoU ${figure(video.miou)}`);
    if (video.doubt !== undefined && video.doubt !== null) right.push(`doubt ${percent(video.doubt)}`);
    card.append(frame, make("h2", {}, video.name, make("span", { title: DOUBT }, right.join(", "))));
    card.append(make("p", { className: "objects" }));
    card.onclick = () => open(video);
    card.onkeydown = (event) => {
        if (event.key === "Enter") open(video);
    };
    sight.observe(card);
    return card;
}

// The objects below a card's picture, or what is wrong with the video.
function describe(video) {
    const place = video.card.lastChild;
    if (video.fault) {
        place.className = "fault";
        place.textContent = video.fault;
        return;
    }
    place.replaceChildren(...video.objects.map((id) => make("span", {}, swatch(id), PREVIEW.classes[id].name)));
}

function swatch(id) {
    const made = make("span", { className: "swatch" });
    made.style.background = PREVIEW.classes[id].colour;
    return made;
}

// A card that comes near the window gets its pictures, one that leaves it lets go of them.
const sight = new IntersectionObserver((changes) => {
    for (const { target, isIntersecting } of changes) {
        const video = target.video;
        if (isIntersecting) {
            inSight.add(video);
            describe(video);
            if (!video.fault) withRecord(video, () => redraw(video));
        } else {
            inSight.delete(video);
            release(video);
        }
    }
}, { rootMargin: NEAR });

function release(video) {
    if (inSight.has(video) || video === large || video === wanted) return;
    video.pictures = {};
    video.record = null;
    video.canvas.width = video.canvas.height = 0;
}

function redraw(video) {
    release(video); // perhaps it came when nobody looked at it any more
    if (!video.record) return;
    const frame = Math.floor(clock) % video.record.frames;
    video.note.hidden = layerOf(video) === element("layer").value;
    if (inSight.has(video) && !large) draw(video.canvas, video, frame, layerOf(video));
    if (video === large) drawLarge();
}

// Videos without labels show their masks whatever is asked for, and say so.
function layerOf(video) {
    const wanted = element("layer").value;
    return wanted && !video.record.figures ? "masks" : wanted;
}

function list() {
    const text = element("find").value.trim().toLowerCase();
    const kind = Number(element("object").value);
    const by = element("sort").value;
    listed = videos.filter(
        (video) =>
            video.name.toLowerCase().includes(text) && (!kind || (video.objects || []).includes(kind))
    );
    const rank = { doubt: (v) => -(v.doubt ?? -1), miou: (v) => v.miou ?? 2 }[by];
    if (rank) listed.sort((a, b) => rank(a) - rank(b)); // stable: else by name
    element("grid").replaceChildren(...listed.map((video) => video.card));
    element("nothing").hidden = listed.length > 0;
    const all = videos.length.toLocaleString("en");
    element("count").textContent =
        listed.length < videos.length ? `${listed.length.toLocaleString("en")} of ${all} videos` : `${all} videos`;
}

function fillObjects() {
    const counts = new Map();
    for (const video of videos) for (const id of video.objects || []) counts.set(id, (counts.get(id) || 0) + 1);
    for (const id of [...counts.keys()].sort((a, b) => a - b))
        element("object").append(make("option", { value: id }, `${PREVIEW.classes[id].name} (${counts.get(id)})`));
}

// ---- one video, large -----------------------------------------------------------------------

const PANELS = { masks: "masks", truth: "true masks", differs: "where they differ" };

function open(video) {
    if (video.fault) return;
    const before = wanted;
    wanted = video;
    if (before) release(before);
    const change = () => {
        if (wanted !== video) return; // closed, or another one was asked for meanwhile
        const last = large;
        large = video;
        if (last) release(last);
        chosen = null;
        position = Math.floor(clock) % video.record.frames;
        element("title").textContent = video.name;
        element("position").max = video.record.frames - 1;
        fillPanels(video);
        fillThings(video);
        if (!element("large").open) element("large").showModal();
        element("doubt").hidden = video.record.objects.every((item) => item.doubt === null);
        element("frame").style.minWidth = `${frameText(video.record.frames - 1).length}ch`;
        history.replaceState(null, "", `#${video.folder}`);
        drawLarge();
    };
    withRecord(video, change);
}

function fillPanels(video) {
    const layers = video.record.figures ? ["masks", "truth", "differs"] : ["masks"];
    const panels = layers.map((layer) => {
        const canvas = make("canvas");
        canvas.setAttribute("role", "img");
        canvas.dataset.layer = layer;
        const frame = make("div", { className: "picture" }, canvas);
        frame.style.aspectRatio = video.record.size.join(" / ");
        const caption = make("figcaption", {}, PANELS[layer]);
        if (layer === "differs")
            for (const [name, colour] of Object.entries(PREVIEW.faults)) {
                const mark = make("span", { className: "swatch" });
                mark.style.background = colour;
                caption.append(" · ", mark, name);
            }
        return make("figure", {}, frame, caption);
    });
    element("panels").replaceChildren(...panels);
}

function fillThings(video) {
    const { frames, objects, figures, faults } = video.record;
    const rows = objects.map((item) => {
        const ticks = make("div", { className: "ticks" });
        for (const [first, last] of spans(item)) {
            const tick = make("i");
            tick.style.left = `${(100 * first) / frames}%`;
            tick.style.width = `${(100 * (last - first + 1)) / frames}%`;
            tick.style.background = PREVIEW.classes[item.id].colour;
            ticks.append(tick);
        }
        ticks.append(make("b"));
        const when = spans(item).map(([a, b]) => (a === b ? a : `${a}–${b}`)).join(", ");
        const row = make(
            "tr", {},
            make("td", {}, swatch(item.id), PREVIEW.classes[item.id].name),
            make("td", { className: "seen" }, ticks),
            make("td", {}, when),
            make("td", { className: "number" }, percent(item.doubt)),
            make("td", { className: "number" }, figure(item.iou))
        );
        row.onclick = () => {
            chosen = chosen === item.id ? null : item.id;
            for (const other of element("items").rows) other.classList.toggle("chosen", other === row && chosen !== null);
            drawLarge();
        };
        return row;
    });
    element("items").replaceChildren(...rows);
    const facts = [`${frames} frames, ${objects.length} objects`];
    if (figures) {
        facts.push(`mIoU ${figure(figures.miou)}`, `SQ ${figure(figures.sq)}`);
        facts.push(`ghosts: ${figures.ghosts.join(", ") || "none"}`, `lost: ${figures.lost.join(", ") || "none"}`);
    }
    element("facts").textContent = [...facts, ...faults].join(" · ");
}

// First and last frames of the stretches in which an object is seen.
function spans(item) {
    const found = [];
    for (const [t] of item.trail) {
        if (found.length && found.at(-1)[1] === t - 1) found.at(-1)[1] = t;
        else found.push([t, t]);
    }
    return found;
}

function frameText(frame) {
    return `frame ${frame} (${frame + 1} of ${large.record.frames})`;
}

function drawLarge() {
    const frames = large.record.frames;
    for (const canvas of element("panels").querySelectorAll("canvas"))
        draw(canvas, large, position, canvas.dataset.layer, chosen);
    element("position").value = position;
    element("frame").textContent = frameText(position);
    for (const mark of element("items").querySelectorAll("b")) mark.style.left = `${(100 * (position + 0.5)) / frames}%`;
}

function go(frame) {
    const frames = large.record.frames;
    play(false);
    position = clock = ((frame % frames) + frames) % frames;
    drawLarge();
}

function neighbour(step) {
    const usable = listed.filter((video) => !video.fault);
    const at = usable.indexOf(large);
    if (usable.length) open(usable[(at + step + usable.length) % usable.length]);
}

function play(on) {
    playing = on;
    for (const id of ["play", "run"]) element(id).textContent = on ? "pause" : "play";
}

// ---- what the user does ---------------------------------------------------------------------

function redrawAll() {
    if (large) drawLarge();
    else inSight.forEach(redraw);
}

const KEYS = {
    " ": () => play(!playing),
    ArrowLeft: () => go(position - 1),
    ArrowRight: () => go(position + 1),
    Home: () => go(0),
    End: () => go(-1),
    ArrowUp: () => neighbour(-1),
    ArrowDown: () => neighbour(1),
    n: () => element("names").click(),
    t: () => element("trails").click(),
};

element("large").addEventListener("keydown", (event) => {
    if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    KEYS[event.key]();
});
element("large").addEventListener("close", () => {
    const last = large;
    large = wanted = null;
    history.replaceState(null, "", location.pathname);
    last.card.scrollIntoView({ block: "nearest" });
    last.card.focus({ preventScroll: true });
    release(last);
    redrawAll();
});
for (const [id, act] of Object.entries({
    close: () => element("large").close(),
    before: () => neighbour(-1),
    after: () => neighbour(1),
    back: () => go(position - 1),
    step: () => go(position + 1),
    run: () => play(!playing),
    play: () => play(!playing),
}))
    element(id).onclick = act;
element("position").oninput = (event) => go(Number(event.target.value));
for (const id of ["find", "object", "sort"])
    element(id).oninput = () => {
        list();
        scrollTo(0, 0);
    };
for (const id of ["layer", "names", "trails"]) element(id).onchange = redrawAll;
addEventListener("resize", redrawAll);

// Pictures of one moment are drawn together, and again only when the next frame is due.
let before = performance.now();
function tick(now) {
    const passed = Math.min(now - before, 500) / 1000;
    before = now;
    if (playing) {
        const shown = Math.floor(clock);
        clock += passed * FRAMES_PER_SECOND;
        if (Math.floor(clock) !== shown) {
            if (large) position = Math.floor(clock) % large.record.frames;
            redrawAll();
        }
    }
    requestAnimationFrame(tick);
}

for (const video of videos) makeCard(video).video = video;
for (const place of document.querySelectorAll(".doubt")) place.title = DOUBT;
element("doubt").textContent = DOUBT;
fillObjects();
list();
play(playing);
requestAnimationFrame(tick);
const linked = videos.find((video) => video.folder === location.hash.slice(1));
if (linked) open(linked);
