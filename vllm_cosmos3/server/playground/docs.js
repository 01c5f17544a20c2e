// Starts Swagger UI on the description of this server.
SwaggerUIBundle({
  url: new URL("openapi.json", document.baseURI).href,
  dom_id: "#swagger-ui",
  deepLinking: true,
  defaultModelsExpandDepth: -1, // schemas are shown where they are used
  tryItOutEnabled: true,
});
