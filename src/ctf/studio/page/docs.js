// The documentation of the API, made from openapi.json.

import { $, el, stored } from "./dom.js";

const openapi = await (await fetch("openapi.json")).json();
const { schemas } = openapi.components;
$("description").textContent = openapi.info.description;

const theme = stored("theme");
if (theme) document.documentElement.dataset.theme = theme;

const nameOf = ({ $ref }) => $ref?.split("/").pop();

function typeOf(schema) {
  if (schema.$ref) return nameOf(schema);
  if (schema.anyOf) return schema.anyOf.map(typeOf).filter((name) => name !== "null").join(" or ");
  if (schema.enum) return schema.enum.join(", ");
  if (schema.type === "array") return `list of ${schema.items ? typeOf(schema.items) : "values"}`;
  const limits = [schema.minimum ?? schema.exclusiveMinimum, schema.maximum ?? schema.exclusiveMaximum];
  const isShort = limits.every((limit) => limit !== undefined) && Math.abs(limits[1]) < 1e9;
  return `${schema.type ?? "value"}${isShort ? `, ${limits[0]} to ${limits[1]}` : ""}`;
}

function createTable(title, fields, required = []) {
  const rows = fields.map(([name, schema]) => el("tr", {},
    el("td", {}, el("code", { textContent: name })),
    el("td", { textContent: typeOf(schema) + (required.includes(name) ? ", required" : "") }),
    el("td", { textContent: schema.description ?? "" })));
  const head = el("thead", {}, el("tr", {}, el("th", { textContent: title }), el("th"), el("th")));
  return el("div", { className: "scroll" }, el("table", {}, head, el("tbody", {}, ...rows)));
}

function createFields(title, schema) {
  const { properties = {}, required } = schemas[nameOf(schema)] ?? schema;
  return createTable(title, Object.entries(properties), required);
}

for (const [path, methods] of Object.entries(openapi.paths)) {
  for (const [method, { description, requestBody, parameters, responses }] of Object.entries(methods)) {
    const section = el("section", { className: "panel" },
      el("h2", {}, el("span", { className: "method", textContent: `${method.toUpperCase()} ` }), el("code", { textContent: path })),
      el("p", { textContent: description }));
    if (parameters) section.append(createTable("Query", parameters.map(({ name, schema, ...rest }) => [name, { ...schema, ...rest }])));
    const json = requestBody?.content["application/json"];
    if (json) section.append(createFields("Request", json.schema));
    else if (requestBody) section.append(el("p", { textContent: `Body: ${Object.keys(requestBody.content)[0]}` }));
    section.append(createFields("Response", responses["200"].content["application/json"].schema));
    $("docs").append(section);
  }
}
for (const name of ["SamplingSettings", "Picture", "Member", "ModelInfo", "Mistake"]) {
  $("docs").append(el("section", { className: "panel" },
    el("h2", { textContent: name }), el("p", { textContent: schemas[name].description }), createFields("Field", schemas[name])));
}
