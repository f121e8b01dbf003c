// What the page says, in English and in Chinese. {name} stands for a value.

const EN = {
  settings: "Settings", help: "Help", close: "Close", copy: "Copy", copied: "Copied", clear: "Clear",
  regenerate: "Regenerate", send: "Send", stop: "Stop", conversation: "Conversation", message: "Your message",
  as_curl: "As curl", as_json: "Save as JSON", debug: "Request {id}",
  system: "System prompt", temperature: "Temperature", max_tokens: "Max tokens", seed: "Seed", fits: "what fits", random: "random",
  key: "API key (kept in this tab only)",
  slots: "slots", queue: "queue", kv: "KV", wait: "wait", of: "{some} / {all}",
  ok: "ready", degraded: "degraded", draining: "shutting down", stalled: "stalled", full: "full", closed: "lets nobody in",
  unreachable: "unreachable",
  locked: "This service asks for an API key: type it under Settings and press Enter.",
  empty: "Ask something. Every answer shows how long it took, and where the time went.",
  hint: "Enter sends · Shift+Enter new line · Esc stops · ↑ edits your last message · / comes here",
  editing: "Editing your last message: Enter sends it instead · Esc leaves it as it was",
  waiting: "waiting for the first token", ttft: "TTFT {time}", speed: "{rate} tokens/s", pieces: "{count} so far", received: "{count} received",
  tokens: "{prompt} tokens in, {answer} out", cached: "{prompt} tokens in ({cached} cached), {answer} out",
  end_stop: "finished", end_length: "cut at the limit", end_stopped: "stopped by you", end_failed: "failed",
  end_cut: "cut off", end_refused: "refused", end_unreachable: "not sent",
  degraded_to: "degraded: {how}", cache: "result cache: {how}",
  went: "Where the {total} went",
  refused_full: "The server is full: it holds {requests} requests, {queue_depth} of them waiting, and {queued_tokens} " +
    "tokens (limit hit: {limit_hit}). A newcomer would wait about {wait} for the first token.",
  refused_401: "This service asks for an API key. Type it under Settings and press Enter: your message is sent again.",
  refused_wrong_key: "This API key is not known here. Correct it under Settings and press Enter.",
  refused: "The server refused ({code}): {message}",
  failed: "The server ended this answer ({code}): {message} What had come until then is above.",
  cut: "The connection ended before the answer did. What had come until then is above.",
  not_sent: "The server cannot be reached. Is serve.py still running?",
  again: "Send again", again_in: "Send again in {wait}",
  not_remembered: "The server does not remember this request any more.",
  state: "The server now",
  now: [["slots", "answers computed at once"], ["queue", "answers that wait for a slot"],
    ["KV", "the part of the cache of keys and values that running answers hold"],
    ["wait", "what a new request would wait for its first token, as foretold"]],
  parts: "Where the time goes",
  part_receive: "the request's body arrives", part_route: "the way to its handler", part_parse: "JSON, and its checks",
  part_cache: "looking for an answer kept before", part_fallback: "another server answers instead",
  part_admit: "asking for a place", part_tokenize: "text becomes tokens", part_queue: "waiting for a slot",
  part_prefill: "the prompt is computed, up to the first token", part_decode: "one step for every further token",
  part_between: "in the engine, between two steps", part_deliver: "from the last token to the end of the stream",
  part_unexplained: "what no part accounts for",
  keys: [["Enter", "send"], ["Shift+Enter", "new line"], ["Esc", "stop the answer, or leave editing"],
    ["↑", "edit your last message, in an empty box"], ["/", "go to the box"]],
};

const ZH = {
  settings: "设置", help: "帮助", close: "关闭", copy: "复制", copied: "已复制", clear: "清空",
  regenerate: "重新生成", send: "发送", stop: "停止", conversation: "对话", message: "你的消息",
  as_curl: "查看 curl 命令", as_json: "保存为 JSON", debug: "请求 {id}",
  system: "系统提示词", temperature: "温度", max_tokens: "最多 token 数", seed: "随机种子", fits: "不限", random: "随机",
  key: "API 密钥（只保存在此标签页）",
  slots: "槽位", queue: "排队", kv: "KV", wait: "等待", of: "{some} / {all}",
  ok: "就绪", degraded: "降级运行", draining: "正在关闭", stalled: "卡住", full: "已满", closed: "暂不接收请求",
  unreachable: "无法连接",
  locked: "此服务需要 API 密钥：请在“设置”中输入并按 Enter。",
  empty: "请提问。每个回答都会显示用时，以及时间花在哪里。",
  hint: "Enter 发送 · Shift+Enter 换行 · Esc 停止 · ↑ 修改上一条 · / 回到输入框",
  editing: "正在修改上一条消息：Enter 发送并替换 · Esc 放弃修改",
  waiting: "等待第一个 token", ttft: "TTFT {time}", speed: "{rate} tokens/s", pieces: "已收到 {count} 段", received: "共 {count} 段",
  tokens: "输入 {prompt}，输出 {answer} tokens", cached: "输入 {prompt}（缓存 {cached}），输出 {answer} tokens",
  end_stop: "完成", end_length: "达到长度上限", end_stopped: "已被你停止", end_failed: "出错",
  end_cut: "连接中断", end_refused: "被拒绝", end_unreachable: "未发送",
  degraded_to: "降级：{how}", cache: "结果缓存：{how}",
  went: "{total} 花在哪里",
  refused_full: "服务器已满：现有 {requests} 个请求，其中 {queue_depth} 个在排队，共 {queued_tokens} 个 token" +
    "（触及上限：{limit_hit}）。新请求预计约 {wait} 后才有第一个 token。",
  refused_401: "此服务需要 API 密钥。请在“设置”中输入并按 Enter，消息会自动重新发送。",
  refused_wrong_key: "此 API 密钥无效。请在“设置”中更正并按 Enter。",
  refused: "服务器拒绝了请求（{code}）：{message}",
  failed: "服务器中止了这个回答（{code}）：{message} 已收到的内容保留在上方。",
  cut: "回答结束之前连接就断开了。已收到的内容保留在上方。",
  not_sent: "无法连接服务器。serve.py 还在运行吗？",
  again: "重新发送", again_in: "{wait} 后可重新发送",
  not_remembered: "服务器已不再保留此请求的记录。",
  state: "服务器现状",
  now: [["槽位", "同时计算的回答数"], ["排队", "等待槽位的回答数"], ["KV", "正在运行的回答占用的键值缓存比例"],
    ["等待", "预计新请求要等多久才有第一个 token"]],
  parts: "时间的各个部分",
  part_receive: "接收请求体", part_route: "到达处理函数", part_parse: "解析并检查 JSON",
  part_cache: "查找已保存的回答", part_fallback: "由另一台服务器代答", part_admit: "申请名额", part_tokenize: "文本转为 token", part_queue: "等待槽位",
  part_prefill: "计算提示词，直到第一个 token", part_decode: "之后每个 token 一步",
  part_between: "在引擎中，两步之间", part_deliver: "从最后一个 token 到流结束",
  part_unexplained: "各部分都没有算到的时间",
  keys: [["Enter", "发送"], ["Shift+Enter", "换行"], ["Esc", "停止回答，或放弃修改"],
    ["↑", "输入框为空时修改上一条消息"], ["/", "回到输入框"]],
};

export const LANGUAGES = { en: EN, zh: ZH };

/** word(name, values) of a language, by the browser's code for it. Unknown names are empty. */
export function wordsOf(language) {
  const words = language.toLowerCase().startsWith("zh") ? ZH : EN;
  return (name, values = {}) => {
    const text = words[name] ?? "";
    return typeof text === "string" ? text.replace(/\{(\w+)\}/g, (_, key) => values[key] ?? "?") : text;
  };
}

/** Give every element that names its word the word. */
export function say(root, word) {
  for (const element of root.querySelectorAll("[data-word]")) element.textContent = word(element.dataset.word);
  for (const element of root.querySelectorAll("[data-hint]")) element.placeholder = word(element.dataset.hint);
  for (const element of root.querySelectorAll("[data-label]")) element.ariaLabel = word(element.dataset.label);
}
